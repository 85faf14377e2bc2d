"""Lays the pictures of a batch run out as a benchmark's judge looks for them.

OUT/pictures is what the judge is given, with nothing else in it; the lists that some judges read
are in OUT, and OUT/manifest.jsonl says of which pictures each file is made, so that a killed
command goes on where it was.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from sana_jax.batch.manifest import Line, Manifest, key_of
from sana_jax.judges.benchmarks import BENCHMARKS, Benchmark
from sana_jax.pictures import encode_png, in_rows, make_grid
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import (
    UNREACHABLE,
    absolute,
    local,
    named,
    reason_of,
    storage,
    write_atomically,
)
from sana_jax.runtime.lock import NAME as LOCK
from sana_jax.runtime.lock import locked
from sana_jax.runtime.progress import Progress

MANIFEST = "manifest.jsonl"


class File(NamedTuple):
    """A file to write, and the lines of the pictures that it is made of."""

    name: str  # below OUT/pictures
    lines: list[Line]


def export(benchmark: str, data: str, out: str, each: int | None = None) -> int:
    """Writes the pictures of the run `data` to `out`, and returns the number of prompts.

    `each`: pictures of a prompt; None: the benchmark's own number. What is there of the same
    pictures stays. Raises UserError, before anything is written for what can be seen before.
    """
    kind = BENCHMARKS[benchmark]
    root = epath.Path(named(data))
    groups = _groups(root, each or kind.each)
    lines = [group[0] for group in groups]
    _check_fields(benchmark, kind, lines)
    files = list(_files(kind, groups, absolute(data).name))  # that of "." too
    if len({file.name for file in files}) < len(files):
        raise UserError(f"--data={data}: two of its prompts have the same {kind.fields[0]}")
    folder = epath.Path(local(out))
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, "--out"):
            _write(benchmark, kind, files, lines, root, folder)
    return len(groups)


def _write(
    benchmark: str,
    kind: Benchmark,
    files: list[File],
    lines: list[Line],
    root: epath.Path,
    folder: epath.Path,
) -> None:
    there = {path.name for path in folder.iterdir()} - {LOCK, f"{MANIFEST}.part"}
    if there and MANIFEST not in there:
        raise UserError(f"--out={folder} is not empty; use another folder")
    if not there:
        write_atomically(folder / MANIFEST, b"")
    manifest = Manifest(folder / MANIFEST)
    if manifest.strange:
        raise UserError(f"{folder / MANIFEST} is not of this program; use another --out")
    keys = {f.name: key_of({benchmark: [line["sha256"] for line in f.lines]}) for f in files}
    for name, line in manifest.lines.items():
        if line["key"] != keys.get(name):
            raise UserError(f"--out={folder} has {name} of other pictures; use another folder")
    manifest.tidy()
    for name, contents in kind.beside(lines).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, json.dumps(contents).encode())
    with Progress(len(files), "file") as bar:
        for file in files:
            path = folder / "pictures" / file.name
            if file.name not in manifest.lines or not path.exists():
                content = _content(kind, file, root)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, content)
                sha256 = hashlib.sha256(content).hexdigest()
                made = {"file": file.name, "key": keys[file.name], "sha256": sha256}
                manifest.append(made | {"of": [line["file"] for line in file.lines]})
            bar.update()
    manifest.sort()


def _groups(root: epath.Path, each: int) -> list[list[Line]]:
    """Returns the lines of each prompt's pictures. Raises UserError where some are missing."""
    try:
        there = (root / MANIFEST).exists()
    except UNREACHABLE as error:
        raise UserError(f"--data={root}: {reason_of(error)}") from None
    if not there:
        raise UserError(f"--data={root} has no manifest.jsonl: give a folder that `sample` wrote")
    found = Manifest(root / MANIFEST).lines
    lines = [found[name] for name in sorted(found)]
    for number, line in enumerate(lines):
        if not line["file"].startswith(f"{number:06d}_"):
            raise UserError(f"--data={root}: picture {number:06d} is missing; run `sample` again")
    groups = [lines[i : i + each] for i in range(0, len(lines), each)]
    for group in groups:
        prompt = group[0].get("prompt")
        same = isinstance(prompt, str) and all(line.get("prompt") == prompt for line in group)
        if len(group) < each or not same:
            raise UserError(
                f"--data={root}: from {group[0]['file']} on there are not {each} pictures of one"
                f" prompt; draw with --num_images_per_prompt={each}, or give --each"
            )
    if not groups:
        raise UserError(f"--data={root}: its manifest.jsonl names no picture")
    return groups


def _check_fields(benchmark: str, kind: Benchmark, lines: list[Line]) -> None:
    for line in lines:
        for name in kind.fields:
            if name not in line:
                raise UserError(
                    f"{line['file']}: its prompt has no {name}, which {benchmark} needs; draw from"
                    " the benchmark's prompts (--task=prompts)"
                )
        first = line[kind.fields[0]]
        text = str(first)
        if not isinstance(first, str | int) or text in ("", ".", "..") or set(text) & {*"/\\\0"}:
            raise UserError(f"{line['file']}: {kind.fields[0]}={first!r:.60} names no file")


def _files(kind: Benchmark, groups: list[list[Line]], run: str) -> Iterator[File]:
    seen: dict[Any, int] = {}
    for p, group in enumerate(groups):
        first = group[0][kind.fields[0]]
        before = seen[first] = seen.get(first, -1) + 1
        if kind.grid:
            yield File(kind.place(p, 0, group[0], run, before), group)
            continue
        for j, line in enumerate(group):
            yield File(kind.place(p, j, line, run, before), [line])


def _content(kind: Benchmark, file: File, root: epath.Path) -> bytes:
    contents = [_read(root, line) for line in file.lines]
    if not kind.grid and file.name.endswith(".png"):
        return contents[0]
    try:
        pictures = [np.asarray(Image.open(io.BytesIO(c)).convert("RGB")) for c in contents]
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{file.lines[0]['file']} is no picture ({error})") from None
    if not kind.grid:
        out = io.BytesIO()
        Image.fromarray(pictures[0]).save(out, "JPEG")
        return out.getvalue()
    if len({picture.shape for picture in pictures}) > 1:
        raise UserError(f"{file.name}: the pictures of one prompt have different sizes")
    return encode_png(make_grid(in_rows(pictures, 2), gap=0))


def _read(root: epath.Path, line: Line) -> bytes:
    try:
        content = (root / line["file"]).read_bytes()
    except (*UNREACHABLE, ValueError) as error:  # ValueError: no file can have such a name
        raise UserError(f"{root / line['file']}: {reason_of(error)}; run `sample` again") from None
    if hashlib.sha256(content).hexdigest() != line["sha256"]:
        raise UserError(f"{root / line['file']} is not the picture that was drawn")
    return content
