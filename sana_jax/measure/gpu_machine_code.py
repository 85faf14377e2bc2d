"""What the assembler makes of a GPU kernel: registers, spills, and the instructions that run.

`assemble` runs ptxas and nvdisasm on PTX; neither needs a GPU. In the disassembly a loop is a
branch back. It turns as often as its counter says, where the counter starts, steps and ends at
constants; another loop counts once and is reported in `unknown_loops`. Both sides of a branch
count.
"""

import dataclasses
import importlib.util
import math
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sana_jax.measure.gpu_targets import Card

LANES = 32  # threads of a warp
_SCHEDULERS = 4  # of a multiprocessor, an instruction of a warp each and cycle
_SPECIAL_CYCLES = 2  # of 16 special function units, for the threads of a warp
_REGISTERS = 65536  # of a multiprocessor
_BLOCKS = 32  # at once on a multiprocessor, at most


class Launched(NamedTuple):
    """The size of a launch."""

    blocks: int
    threads: int  # of a block
    shared_bytes: int  # of a block, dynamic

    @property
    def block_warps(self) -> int:
        """The warps of a block."""
        return -(-self.threads // LANES)


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a kernel takes of a multiprocessor."""

    target: str  # sm_90a
    registers: int  # of a thread
    spilled_bytes: int  # of a thread, stores and loads
    shared_bytes: int  # static

    def occupancy(self, launch: Launched, card: Card) -> int:
        """Returns the warps that a multiprocessor holds at once."""
        warps = launch.block_warps
        of_warp = -(-self.registers * LANES // 256) * 256  # in steps of 256
        blocks = min(_REGISTERS // max(256, of_warp) // warps, card.warps // warps, _BLOCKS)
        if shared := launch.shared_bytes + self.shared_bytes:
            blocks = min(blocks, card.shared_bytes // (shared + 1024))
        return blocks * warps


@dataclasses.dataclass(frozen=True)
class Code(Resources):
    """A kernel's machine code; counts are of what one warp executes."""

    instructions: int
    special: int  # of the special function units
    accesses: int  # instructions of the load and store units
    loaded_bytes: int | None  # from global memory; None: a part is loaded by other means
    tensor_flops: int
    unknown_loops: int

    def seconds(self, launch: Launched, card: Card) -> float:
        """Returns a lower bound by instructions: the fullest multiprocessor, at boost clock."""
        warps = -(-launch.blocks // card.multiprocessors) * launch.block_warps
        cycles = max(
            self.instructions * max(1, warps / _SCHEDULERS),
            self.special * _SPECIAL_CYCLES * warps,
            self.accesses * warps,
        )
        tensor = self.tensor_flops * launch.blocks * launch.block_warps / card.half_flops
        return max(cycles / card.hertz, tensor)


def tool(name: str) -> str | None:
    """Returns the path of ptxas or nvdisasm, of NVIDIA's wheels or a CUDA toolkit, or None."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob(f"*/bin/{name}")):
            return str(path)
    return shutil.which(name)


def assemble(ptx: str) -> Code:
    """Returns the code of a file's only kernel. Raises ValueError if the assembler refuses it."""
    with tempfile.TemporaryDirectory(prefix="sana_jax_ptx_") as folder:
        binary = Path(folder, "kernel.cubin")
        used = _ptxas(ptx, binary)
        listing = _run(tool("nvdisasm"), "-c", binary, check=True).stdout
    return read(used, listing)


def resources(ptx: str) -> Resources:
    """Returns what a file's only kernel takes. Raises ValueError if the assembler refuses it."""
    with tempfile.TemporaryDirectory(prefix="sana_jax_ptx_") as folder:
        return _ptxas(ptx, Path(folder, "kernel.cubin"))


def _run(*command, check: bool = False) -> subprocess.CompletedProcess:
    return subprocess.run(command, check=check, capture_output=True, text=True)


def _ptxas(ptx: str, binary: Path) -> Resources:
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    source = binary.with_suffix(".ptx")
    source.write_text(ptx)
    made = _run(tool("ptxas"), "-v", f"-arch={target}", "-o", binary, source)
    if made.returncode:
        raise ValueError(f"ptxas: {made.stderr.strip()[:300]}")
    return parse_resources(target, made.stderr)


def parse_resources(target: str, said: str) -> Resources:
    """Returns what ptxas -v says of a kernel."""
    shared = re.search(r"(\d+) bytes smem", said)
    return Resources(
        target=target,
        registers=int(re.search(r"Used (\d+) registers", said)[1]),
        spilled_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        shared_bytes=int(shared[1]) if shared else 0,
    )


def read(used: Resources, listing: str) -> Code:
    """Returns the code that takes these resources, and that nvdisasm -c lists."""
    code, times, unknown = executions(listing)
    special = accesses = tensor = 0
    loaded: int | None = 0
    for (_, opcode, _), count in zip(code, times.tolist(), strict=True):
        kind, *parts = opcode.split(".")
        special += count * (kind == "MUFU")
        accesses += count * bool(_ACCESS.fullmatch(kind))
        tensor += count * _tensor_flops(kind, parts)
        if kind in ("LDG", "LDGSTS") and loaded is not None:
            loaded += count * LANES * next((_WIDTH[p] for p in parts if p in _WIDTH), 4)
        elif kind in ("LD", "UTMALDG", "UBLKCP"):
            loaded = None
    return Code(
        **vars(used),
        instructions=int(times.sum()),
        special=special,
        accesses=accesses,
        loaded_bytes=None if unknown else loaded,
        tensor_flops=tensor,
        unknown_loops=unknown,
    )


_ACCESS = re.compile("LD|LDG|LDGSTS|ST|STG|LDL|STL|LDS|STS|LDSM|STSM|ATOM|ATOMG|ATOMS|RED")
_WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # bytes; others have 4
_PRODUCTS = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}  # multiplications
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


def _tensor_flops(kind: str, parts: list[str]) -> int:
    """Returns the FLOPs of one warp's part in an instruction of the tensor cores."""
    if kind == "HGMMA":  # four warps compute it together
        return 2 * math.prod(map(int, parts[0].split("x"))) // 4
    return 2 * _PRODUCTS.get(parts[0], 0) if kind in ("HMMA", "IMMA") else 0


class _Instruction(NamedTuple):
    predicate: str  # P3 of @!P3; "" without one
    opcode: str
    operands: list[str]


def executions(listing: str) -> tuple[list[_Instruction], np.ndarray, int]:
    """Returns the instructions, how often a warp runs each, and the number of unknown loops."""
    code: list[_Instruction] = []
    negated: list[bool] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        found = _INSTRUCTION.match(line)
        if found and found[2] != "NOP":
            operands = [x.strip().removesuffix(".reuse") for x in found[3].split(",")]
            code.append(_Instruction(found[1] or "", found[2], operands))
            negated.append("@!" in line)

    targets = {}
    for i, x in enumerate(code):
        if label := re.search(r"`\((\.L_\w+)\)", " ".join(x.operands)):
            targets[i] = labels.get(label[1], len(code))
    times, unknown = np.ones(len(code), np.int64), 0
    for end, start in targets.items():
        if start >= end or not code[end].opcode.startswith("BRA"):
            continue  # forward, or the endless loop behind the last instruction
        turns = _turns(code, negated, targets, start, end)
        unknown += turns is None
        times[start : end + 1] *= turns or 1
    return code, times, unknown


def _turns(code, negated, targets, start: int, end: int) -> int | None:
    """Returns the turns of the loop from `start` to `end`; None if they are unknown."""
    found = []
    for i in range(start, end + 1):
        leaves = code[i].opcode == "EXIT" or not start <= targets.get(i, start) <= end
        if code[i].predicate and (i == end or leaves):
            found.append(_counted(code, start, end, i, stays=(i == end) != negated[i]))
    known = [turns for turns in found if turns is not None and turns > 0]
    return min(known, default=None)


# What a comparison means with its sides changed, and for the branch that leaves the loop.
_MIRRORED = {"NE": "NE", "EQ": "EQ", "LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}
_INVERSE = {"EQ": "NE", "GE": "LT", "GT": "LE", "LE": "GT", "LT": "GE"}


def _counted(code, start: int, end: int, branch: int, stays: bool) -> int | None:
    """Returns the turns of a loop by the branch that ends it, or goes on where `stays`."""
    compare = _writer(code, code[branch].predicate, branch, start)
    if compare is None or "SETP" not in code[compare].opcode:
        return None
    relation = code[compare].opcode.split(".")[1]
    _, _, counter, last, *more = code[compare].operands
    if _constant(counter) is not None:
        counter, last, relation = last, counter, _MIRRORED.get(relation)
    relation = relation if stays else _INVERSE.get(relation)
    add = _writer(code, counter, end + 1, start)
    if more not in (["PT"], ["UPT"]) or _constant(last) is None or add is None:
        return None
    _, added, step, *more = code[add].operands + [""]
    step = _constant(step)
    if not re.match("IADD3|VIADD|UIADD3", code[add].opcode) or not step:
        return None
    begin = _writer(code, added, start, 0)
    first = None if begin is None else _initial(code[begin])
    if first is None or relation not in (("NE", "LT", "LE") if step > 0 else ("NE", "GT", "GE")):
        return None
    way = (_constant(last) - first + 2**31) % 2**32 - 2**31
    turns = way // step + 1 if relation in ("LE", "GE") else -(-way // step)
    return turns + (compare < add)  # the counter before its step


def _writer(code, register: str, before: int, after: int) -> int | None:
    """Returns the last instruction in code[after:before] that writes a register or predicate."""
    for i in range(before - 1, after - 1, -1):
        opcode, written = code[i].opcode, code[i].operands[:1]
        if "SETP" in opcode:
            written = code[i].operands[:2]
        elif re.match(r"CS2R|.*\.(64|128|WIDE)", opcode) and re.fullmatch(r"U?R\d+", written[0]):
            name, number = re.fullmatch(r"(U?R)(\d+)", written[0]).groups()
            written = [f"{name}{int(number) + j}" for j in range(4 if "128" in opcode else 2)]
        if register in written and not opcode.startswith(("ST", "BRA", "RED")):
            return i
    return None


def _constant(text: str) -> int | None:
    if text in ("RZ", "URZ"):
        return 0
    if not re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", text):
        return None
    return (int(text, 0) + 2**31) % 2**32 - 2**31  # signed


def _initial(x: _Instruction) -> int | None:
    """Returns the constant that an instruction writes, if it writes one."""
    if x.predicate:
        return None
    if x.opcode.startswith(("MOV", "UMOV", "IMAD.MOV")):
        return _constant(x.operands[-1])
    if x.opcode.startswith("CS2R"):
        return 0 if x.operands[1] == "SRZ" else None
    if x.opcode.startswith("HFMA2") and x.operands[1:3] == [
        "-RZ",
        "RZ",
    ]:  # a constant as two halves
        low, high = (struct.pack("<e", float(v)) for v in reversed(x.operands[3:5]))
        return int.from_bytes(low + high, "little")
    return None
