"""What a program launches on a GPU, read from XLA's optimised HLO: kernels, bytes, FLOPs.

Every instruction that computes is a launch: a fusion, a copy, a call of cuBLASLt or cuDNN, a Pallas
kernel. The body of a loop counts as often as the loop turns, where the compiler knows it, and once
where it does not; of a conditional the branch that moves most bytes counts.

Bytes are those of operands and results, each once, as if none of them stayed in a cache. A fusion
that only slices an operand reads the slices; one that updates a part of an array in place writes
the part. FLOPs are those of matrix products, convolutions and cuDNN's attention.
"""

import dataclasses
import math
import re
from typing import NamedTuple

_LINE = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+[0-9][a-z0-9]*|pred)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(condition|body|to_apply|calls)=%([\w.\-]+)")
_COLLECTIVES = set(
    "all-reduce all-gather reduce-scatter all-to-all collective-permute ragged-all-to-all".split()
)
# They launch nothing. Of an operation in two halves, "-start" and "-done", the first counts.
_FREE = set(
    "parameter constant tuple get-tuple-element bitcast after-all opt-barrier partition-id"
    " replica-id".split()
)


class Instruction(NamedTuple):
    """A line of HLO."""

    name: str
    shape: str  # of the result, with its type: bf16[2,1024,3456]{2,1,0}
    opcode: str
    operands: list[str]  # names; of a parameter, its number
    attributes: str  # the rest of the line
    root: bool


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel, a copy or a call of a library, as often as the program runs it."""

    name: str  # of the instruction
    label: str  # the JAX operation it came from
    kind: str  # a fusion's kind, a custom call's target, or the opcode
    calls: int
    bytes_read: int  # of one call, as is all below
    bytes_written: int
    flops: float
    dtype: str  # of the products; "" without any
    highest: bool = False  # products of float32 at the highest precision


@dataclasses.dataclass(frozen=True)
class Program:
    """The launches of a program, and its collectives: kind -> (executions, bytes of results)."""

    launches: list[Launch]
    collectives: dict[str, tuple[int, int]]


def read(text: str) -> Program:
    """Returns what a compiled program launches; `text` is its optimised HLO."""
    computations, entry = parse(text)
    found = _visit(computations, entry, 1)
    collectives: dict[str, tuple[int, int]] = {}
    for launch in (x for x in found if x.kind in _COLLECTIVES):
        count, size = collectives.get(launch.kind, (0, 0))
        moved = launch.calls * launch.bytes_written
        collectives[launch.kind] = count + launch.calls, size + moved
    return Program([x for x in found if x.kind not in _COLLECTIVES], collectives)


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the instructions of every computation by its name, and the name of the entry."""
    found: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (made := _LINE.match(re.sub(r"/\*index=\d+\*/", "", line))):
            root, name, shape, opcode, rest = made.groups()
            if opcode.endswith("-start") and opcode != "async-start":
                opcode = opcode.removesuffix("-start")
                shape = _result(opcode, shape)
            inside, _, attributes = rest.partition(")")
            operands = [inside] if opcode == "parameter" else re.findall(r"%([\w.\-]+)", inside)
            current.append(Instruction(name, shape, opcode, operands, attributes, bool(root)))
    return found, entry


def _result(opcode: str, shape: str) -> str:
    """Returns the result in the shape of an operation's first half: (operands, result, ...)."""
    if opcode == "all-reduce" or not shape.startswith("("):
        return shape
    depth, parts = 0, [""]
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts[0 if opcode == "copy" else 1]


def arrays(shape: str) -> list[tuple[str, list[int]]]:
    """Returns the type and sizes of every array of a shape, also inside tuples."""
    return [
        (dtype, [int(size) for size in sizes.split(",") if size])
        for dtype, sizes in _ARRAY.findall(shape)
    ]


def size(shape: str) -> int:
    """Returns the bytes of a shape."""
    return sum(math.prod(sizes) * _bits(dtype) for dtype, sizes in arrays(shape)) // 8


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])


def _visit(computations: dict[str, list[Instruction]], name: str, calls: int) -> list[Launch]:
    found = []
    shapes = {x.name: x.shape for x in computations[name]}
    for x in computations[name]:
        called = dict(_CALLED.findall(x.attributes))
        if x.opcode == "while":
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', x.attributes)
            turns = int(trips[1]) if trips else 1
            found += _visit(computations, called["condition"], calls * (turns + 1))
            found += _visit(computations, called["body"], calls * turns)
        elif x.opcode == "conditional":
            listed = re.search(r"branch_computations=\{([^}]*)\}", x.attributes)
            names = re.findall(r"(?:true|false)_computation=%([\w.\-]+)", x.attributes)
            names += re.findall(r"%([\w.\-]+)", listed[1]) if listed else []
            branches = [_visit(computations, branch, calls) for branch in names]
            found += max(branches, key=lambda b: sum(y.bytes_read + y.bytes_written for y in b))
        elif x.opcode in ("call", "async-start"):
            found += _visit(computations, called.get("to_apply") or called["calls"], calls)
        elif x.opcode not in _FREE and not x.opcode.endswith(("-done", "-update")):
            found.append(_launch(x, shapes, computations.get(called.get("calls", ""), []), calls))
    return found


def _launch(x: Instruction, shapes, inside: list[Instruction], calls: int) -> Launch:
    label = re.search(r'op_name="([^"]*)"', x.attributes)
    kind, shape = x.opcode, x.shape
    read = sum(size(shapes[operand]) for operand in dict.fromkeys(x.operands))
    written = size(shape)
    products = [_product(x, shapes)]
    if x.opcode == "fusion":
        kind = re.search(r"kind=k(\w+)", x.attributes)[1].lower()
        if backend := re.search(r'"fusion_backend_config":\{"kind":"_*([^"]*)"', x.attributes):
            kind = backend[1]
        within = {y.name: y.shape for y in inside}
        products = [_product(y, within) for y in inside]
        read, written = _fusion_bytes(x, inside, shapes)
    elif x.opcode == "custom-call":
        kind = re.search(r'custom_call_target="([^"]*)"', x.attributes)[1]
        if kind.startswith(("__cublas", "__cudnn")):  # their last result is scratch
            written = size(re.sub(r"s8\[\d+\]|u8\[\d+\]", "", shape))
    elif "slice" in x.opcode:
        read = min(read, written)
    flops = sum(count for count, *_ in products)
    dtype, highest = next(((d, h) for count, d, h in products if count), ("", False))
    name = label[1] if label else x.name
    return Launch(x.name, name, kind, calls, read, written, flops, dtype, highest)


def _fusion_bytes(x: Instruction, inside: list[Instruction], shapes) -> tuple[int, int]:
    """Returns the bytes that a fusion reads and writes."""
    made = {y.name: y for y in inside}
    users: dict[str, list[Instruction]] = {}
    for y in inside:
        for operand in y.operands if y.opcode != "parameter" else ():
            users.setdefault(operand, []).append(y)

    def part(name: str, whole: int) -> int:
        """The bytes read of a parameter, or of a view of it."""
        total = 0
        for user in users.get(name, ()):
            if user.opcode in ("slice", "dynamic-slice", "gather") and user.operands[0] == name:
                total += size(user.shape)
            elif user.opcode == "bitcast":
                total += part(user.name, whole)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                pass  # updated in place
            else:
                return whole
        return min(total, whole)

    def updated(y: Instruction) -> int:
        """The bytes written of a result."""
        while y.opcode == "bitcast":
            y = made[y.operands[0]]
        return size(made[y.operands[1]].shape if y.opcode == "dynamic-update-slice" else y.shape)

    parameters = [y for y in inside if y.opcode == "parameter"]
    read = sum(part(y.name, size(shapes[x.operands[int(y.operands[0])]])) for y in parameters)
    root = next(y for y in inside if y.root)
    results = [made[o] for o in root.operands] if root.opcode == "tuple" else [root]
    return read, sum(map(updated, results))


def _product(x: Instruction, shapes) -> tuple[float, str, bool]:
    """Returns FLOPs, type and "at the highest precision?" of a product; without one, no FLOPs."""
    target = re.search(r'custom_call_target="([^"]*)"', x.attributes)
    target = target[1] if target else ""
    is_product = x.opcode == "dot" or target.startswith("__cublas")
    is_convolution = x.opcode == "convolution" or target.startswith("__cudnn$conv")
    if not (is_product or is_convolution or target.startswith("__cudnn$fmha")):
        return 0, "", False
    (dtype, left), (_, right) = (arrays(shapes[operand])[0] for operand in x.operands[:2])
    result = arrays(x.shape)[0][1]
    highest = bool(re.search(r'operand_precision"?[=:][{\[]"?highest', x.attributes, re.IGNORECASE))
    if is_product:
        pattern = r'lhs_contracting_dim(?:s|ensions)"?[=:][{\[]([^}\]]*)'
        axes = re.findall(r"\d+", re.search(pattern, x.attributes)[1])
        return 2 * math.prod(result) * math.prod(left[int(i)] for i in axes), dtype, highest
    if is_convolution:
        # Of a gradient too, `dim_labels` are those of the forward convolution.
        if "BackwardInput" in target:
            result = left
        elif "BackwardFilter" in target:
            result, right = right, result
        kernel = re.search(r"dim_labels=\w+_(\w+)->", x.attributes)[1]
        return 2 * math.prod(result) * math.prod(right) / right[kernel.index("o")], dtype, highest
    # cuDNN's attention: q (B, N, H, D) and k (B, L, H, D), two products; five for the gradient.
    axes = math.prod(left) * right[1]
    return (10 if "Backward" in target else 4) * axes, dtype, highest
