"""Mutations of files: by the structure of their format, and by bytes.

Each function takes a file's content and a random.Random, whose state decides the result.
"""

import copy
import io
import json
import pickle
import pickletools
import zipfile
from random import Random
from typing import Any

NUMBERS = (
    0, -1, 1, 2, 3, 0.5, -0.0, 1e-320, 1e-9, 1e12, 1e308, 10**6, 10**9, 2**31, 2**53, 2**63, 2**64,
    -(2**63), 10**30,
)  # fmt: skip
TEXTS = (
    "", " ", "x", "é\u2028\u0085\0", "\ud800", "../x", "/etc/hostname", "a/../../b", "x" * 300,
    "y" * 70_000, "1", "true", "\n", "-" * 5000 + "/" + "z" * 5000, "[MASK]", "%s{}", "\u202e",
)  # fmt: skip
OTHERS = (None, True, False, [], {}, [[]], [None], [1], ["x"], {"x": 1}, {"": {}}, [{}], [[1, 2]])
# JSON's own words, which json.dumps would not write so.
RAW = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400, "9" * 5000, "1.0", "1E400",
    "0." + "1" * 3000, "[" * 300 + "]" * 300, '{"a":' * 900 + "1" + "}" * 900,
    "[" * 50_000 + "]" * 50_000, '{"a":' * 30_000 + "1" + "}" * 30_000, "[" * 3000, '"x',
    "[" + "0," * 100_000 + "0]", '"' + "w" * 1_000_000 + '"', '"\\ud800\\udc00"', "01", "'a'", "",
)  # fmt: skip


def json_text(content: bytes, rng: Random) -> bytes:
    """Mutates one to three nodes of a JSON document; the result may be no JSON."""
    tree = [json.loads(content)]
    raw: dict[str, str] = {}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change(tree, rng, raw)
    text = json.dumps(tree[0], indent=rng.choice((None, 2)), ensure_ascii=rng.random() < 0.9)
    for mark, written in raw.items():
        text = text.replace(json.dumps(mark), written)
    return text.encode("utf-8", "surrogatepass")


def json_lines(content: bytes, rng: Random) -> bytes:
    """Mutates one line of a .jsonl file as JSON, or the lines as such."""
    lines = content.split(b"\n")
    i = rng.randrange(len(lines))
    if rng.random() < 0.7 and lines[i].strip():
        lines[i] = json_text(lines[i], rng).replace(b"\n", b" ")
    else:
        lines = _rearranged(lines, i, rng)
    return rng.choice((b"\n",) * 8 + (b"\r\n", b"\r")).join(lines)


def text(content: bytes, rng: Random) -> bytes:
    """Mutates the lines of a text."""
    lines = content.split(b"\n")
    i = rng.randrange(len(lines))
    if rng.random() < 0.5:
        added = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
        lines[i] = lines[i] + added if rng.random() < 0.5 else added
    else:
        lines = _rearranged(lines, i, rng)
    return rng.choice((b"\n",) * 8 + (b"\r\n", b"\r", b"\xe2\x80\xa8")).join(lines)


def yaml_text(content: bytes, rng: Random) -> bytes:
    """Mutates a YAML document whose content is JSON: tags, dates, anchors, or as JSON."""
    if rng.random() < 0.4:
        return json_text(content, rng)
    lines = content.decode().split("\n")
    i = rng.randrange(len(lines))
    word = rng.choice((
        "2024-01-01", "!!binary aGk=", "!!set {a, b}", "!!python/tuple [a]", "*other",
        "&a [*a, *a]", "!!timestamp x", "12:30:45", "0o17", ".inf", "~", "!unknown x", "<<: *x",
        "? [a, b] : c", "| \n  x", "!!omap [a: 1]", "!!float x", "!!int x", "2024-99-99", "\t",
        "%YAML 9.9", "--- a\n---", "[" * 2000, "{a: " * 2000, "- " * 3000, "&x " + "y" * 100_000,
    ))  # fmt: skip
    if rng.random() < 0.2:  # each line has the one before it nine times
        many = "\n".join(
            f"k{n}: &k{n} {{<<: [{', '.join([f'*k{n - 1}'] * 9)}], v{n}: 1}}" for n in range(1, 5)
        )
        return f"k0: &k0 {{v0: 1}}\n{many}\ntext_encoder: *k4\n".encode()
    lines[i] = lines[i].partition(":")[0] + ": " + word if rng.random() < 0.5 else word
    return "\n".join(lines).encode()


def safetensors(content: bytes, rng: Random) -> bytes:
    """Mutates the header of a .safetensors file as JSON, or its length."""
    size = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + size], content[8 + size :]
    header = json_text(header, rng)
    length = len(header)
    if rng.random() < 0.2:
        length = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63 - 1, 2**64 - 1, 10**8))
    return length.to_bytes(8, "little") + header + body


def pth(content: bytes, rng: Random) -> bytes:
    """Mutates the opcodes of the pickle in a .pth file, or the members of its zip."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    if rng.random() < 0.85:
        members[name] = _opcodes(members[name], rng)
    else:
        other = rng.choice([*members])
        members[other] = byte_level(members[other], rng)
        if rng.random() < 0.3:
            members[rng.choice(TEXTS[1:9]).replace("\ud800", "s")] = members.pop(other)
    made = io.BytesIO()
    kind = rng.choice((zipfile.ZIP_STORED,) * 19 + (zipfile.ZIP_DEFLATED,))
    with zipfile.ZipFile(made, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, kind)  # which has no clock's time
    return made.getvalue()


def byte_level(content: bytes, rng: Random) -> bytes:
    """Flips, cuts, inserts and repeats bytes."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        i = rng.randrange(len(data) + 1)
        j = min(len(data), i + rng.choice((1, 2, 8, 100, 5000)))
        kind = rng.randrange(8)
        if kind < 3 and i < len(data):
            data[i] = rng.choice((data[i] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255))
        elif kind == 3:
            del data[i:j]
        elif kind == 4:
            data[i:i] = rng.randbytes(rng.choice((1, 4, 100)))
        elif kind == 5:
            data[i:i] = data[i:j] * rng.choice((1, 2, 50))
        elif kind == 6:
            data[i:j] = bytes(j - i)
        else:
            data = data[:i] if rng.random() < 0.5 else data + rng.randbytes(20)
    if rng.random() < 0.03:
        data = rng.choice((b"", b"\0" * len(data), b"\xef\xbb\xbf" + data, b"<html>", data * 2,
                           b"version https://git-lfs.github.com/spec/v1\n"))  # fmt: skip
    return bytes(data)


def _rearranged(lines: list[bytes], i: int, rng: Random) -> list[bytes]:
    line = lines[i]
    kind = rng.randrange(8)
    if kind == 0:
        return lines[:i] + lines[i + 1 :]
    if kind == 1:
        return lines[:i] + [line] * rng.choice((2, 3, 300)) + lines[i + 1 :]
    if kind == 2:
        return lines[: i + 1] + [b""] + lines[i + 1 :]
    if kind == 3:
        return lines[:i] + [line[: len(line) // 2]]
    if kind == 4:
        return lines[:i] + [line[len(line) // 2 :]] + lines[i + 1 :]
    if kind == 5:
        return lines[:i] + [b"\0" * len(line)] + lines[i + 1 :]
    if kind == 6:
        return rng.sample(lines, len(lines))
    return lines[:i] + [line * rng.choice((2, 100, 20_000))] + lines[i + 1 :]


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Returns every (container, key) below a tree."""
    found, open_ones = [], [tree]
    while open_ones:
        node = open_ones.pop()
        keys = node if isinstance(node, dict) else range(len(node))
        for key in [*keys][:2000]:  # of a tokenizer's vocabulary this is enough
            found.append((node, key))
            if isinstance(node[key], dict | list):
                open_ones.append(node[key])
    return found


def _change(tree: list, rng: Random, raw: dict[str, str]) -> None:
    places = _places(tree)
    node, key = rng.choice(places)
    if rng.random() < 0.3:  # a document's upper levels have few places, and decide much
        node, key = rng.choice(places[: 1 + len(places) // 8])

    def written(text: str) -> str:
        mark = f"raw {len(raw)} {rng.random()}"
        raw[mark] = text
        return mark

    value, kind = node[key], rng.randrange(12)
    if kind == 0:
        node[key] = copy.deepcopy(rng.choice(OTHERS))  # it may be changed again
    elif kind == 1:
        node[key] = rng.choice(NUMBERS)
    elif kind == 2:
        node[key] = rng.choice(TEXTS)
    elif kind == 3:
        node[key] = written(rng.choice(RAW))
    elif kind == 4 and isinstance(value, int | float):
        node[key] = rng.choice((value + 1, value * 2, -value, value * 1000, float(value),
                                str(value), value / 2))  # fmt: skip
    elif kind == 5 and node is not tree:
        del node[key]
    elif kind == 6 and isinstance(node, dict):
        node[rng.choice(TEXTS)] = node.pop(key) if rng.random() < 0.5 else value
    elif kind == 7 and isinstance(node, dict):
        twice = json.dumps(rng.choice((value, *OTHERS, *NUMBERS[:5])))
        node[key] = written(f"{json.dumps(value)}, {json.dumps(key)}: {twice}")
    elif kind == 8:
        other, name = rng.choice(places)
        node[key] = json.loads(json.dumps(other[name] if _has(other, name) else None))
    elif kind == 9 and isinstance(value, list):
        node[key] = rng.choice((value[:-1], value * 2, value * 50, value[::-1], [value], []))
    elif kind == 10 and isinstance(value, str):
        node[key] = rng.choice((value[:-1], value * 2, value.upper(), value + "\0", [value],
                                value * 400))  # fmt: skip
    else:
        node[key] = rng.choice(([value], {"x": value}, [value, value], str(value)))


def _has(node: Any, key: Any) -> bool:
    return key in node if isinstance(node, dict) else key < len(node)


_LENGTHS = {4: (0, 1, 255, 2**16, 2**31 - 1, 2**32 - 1), 8: (0, 255, 2**31, 2**33, 2**63 - 1)}


def _opcodes(data: bytes, rng: Random) -> bytes:
    """Mutates the opcodes of a pickle; stacks and references need not fit any more."""
    steps = [at for *_, at in pickletools.genops(data)] + [len(data)]
    codes = [data[a:b] for a, b in zip(steps, steps[1:], strict=False)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        i = rng.randrange(len(codes))
        kind = rng.randrange(6)
        if kind == 0:
            del codes[i]
        elif kind == 1:
            codes.insert(i, rng.choice(codes) * rng.choice((1, 1, 500)))
        elif kind == 2:
            j = rng.randrange(len(codes))
            codes[i], codes[j] = codes[j], codes[i]
        elif kind == 3:
            codes[i] = byte_level(codes[i], rng)
        else:
            codes[i:i] = [_opcode(rng)]
        if not codes:
            break
    return b"".join(codes)


def _opcode(rng: Random) -> bytes:
    """Returns any opcode of any protocol, with an argument that may be far too large."""
    wide = (pickle.BINUNICODE8, pickle.BINBYTES8, pickle.BYTEARRAY8, pickle.FRAME)
    long = (pickle.BINUNICODE, pickle.BINBYTES, pickle.BINSTRING, pickle.LONG4, pickle.LONG_BINPUT,
            pickle.LONG_BINGET, pickle.BININT)  # fmt: skip
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(wide) + rng.choice(_LENGTHS[8]).to_bytes(8, "little") + b"x"
    if kind == 1:
        return rng.choice(long) + rng.choice(_LENGTHS[4]).to_bytes(4, "little") + b"x"
    if kind == 2:
        return rng.choice((b"(" * 3000, b"]" * 5000, b")\x85" * 2000, b"}" * 2000,
                           b"I" + b"9" * 5000 + b"\n", b"L" + b"9" * 5000 + b"L\n", b"F1e999\n",
                           b"cos\nsystem\n", b"\x8c\x02os\x8c\x06system\x93", b"P1\n",
                           b"]\x94" * 1000, b"2" * 3000))  # fmt: skip
    return rng.choice(pickletools.opcodes).code.encode("latin-1")
