"""Estimates the cost of a program on a TPU by the TPU compiler's own figures, without a TPU.

libtpu (from PyPI, pinned by jax[tpu]) compiles on any x86-64 Linux host. Its executable names the
cycles of every fused operation, and `estimate` adds them up: loop bodies times their trips, the
costliest branch of a conditional. Collectives have no cycles; they are listed with their bytes.

The compiler has no estimate for a Pallas kernel. Here a kernel costs the largest of

    bundles    scheduled instruction bundles, each times the trips of all loops around it
    compute    the FLOPs it declares over the chip's peak
    memory     the bytes it declares, or of its operands and results, over the bandwidth

and a kernel whose schedule was not found is an error. Bundles under `pl.when` count every time,
and a grid's pipeline takes two steps more than the grid has.

This is a model of one chip, not a measurement: compare programs of the same compiler. On v5e and
v5p the estimate of a plain matrix product is 94 % of peak, on v6e 57 %.

Import this before anything that loads libtpu: it tells the compiler to write its schedules.
"""

import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sana_jax.runtime import signals

# libtpu reads these variables once, when it is loaded: it must not look for a TPU or its host, must
# let other processes load it too, and write the schedules of kernels into _DUMP.
_DUMP = Path(tempfile.mkdtemp(prefix="sana_jax_tpu_"))
signals.at_end(functools.partial(shutil.rmtree, _DUMP, ignore_errors=True))
for _name, _value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}.items():
    os.environ.setdefault(_name, _value)
_ARGS = os.environ.get("LIBTPU_INIT_ARGS", "")
os.environ["LIBTPU_INIT_ARGS"] = (
    f"{_ARGS} --xla_jf_dump_to={_DUMP} --xla_jf_dump_llo_text=true"
    " --xla_jf_dump_llo_pass_label_regex=.*final_bundles"
)

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AxisType, Mesh  # noqa: E402

from sana_jax.measure.account import Memory  # noqa: E402
from sana_jax.runtime.errors import UserError  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Chip:
    """The vendor's figures of one device, in JAX's sense of a device."""

    prefix: str  # of the topology's name
    hertz: float
    flops_per_cycle: int  # bfloat16
    hbm_bytes_per_second: float
    hbm_bytes: int  # the compiler's limit for a program, a little less than the chip has


CHIPS = {
    "v5e": Chip("v5e", 1.503e9, 131072, 819e9, int(15.75 * 2**30)),
    "v5p": Chip("v5", 1.75e9, 262144, 2765e9, int(95.74 * 2**30)),
    "v6e": Chip("v6e", 1.75e9, 524288, 1640e9, int(31.25 * 2**30)),
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The cycles of one call of a Pallas kernel, for each possible bound."""

    bundles: int
    compute: int
    memory: int

    @property
    def cycles(self) -> int:
        """The cycles of a call: the largest of the three bounds."""
        return max(self.bundles, self.compute, self.memory)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate(Memory):
    """The cost on one chip: `cycles` of XLA's operations, `kernel_cycles` of Pallas calls."""

    chip: Chip
    operations: list[tuple[int, str]]  # (cycles, name), largest first, kernels included
    cycles: int
    kernel_cycles: int
    kernels: dict[str, tuple[int, Kernel]]  # name -> (calls, cost of one)
    collectives: dict[str, tuple[int, int]]  # kind -> (executions, bytes of the results in all)

    @property
    def seconds(self) -> float:
        """The time of all operations and kernels, one after the other, without collectives."""
        return (self.cycles + self.kernel_cycles) / self.chip.hertz

    def utilisation(self, model_flops: float) -> float:
        """Returns model FLOPs over the chip's peak in the estimated time (MFU)."""
        return model_flops / (self.chip.flops_per_cycle * (self.cycles + self.kernel_cycles))


class TooLarge(Exception):
    """Raised for a program that needs more memory than the chip has."""

    def __init__(self, needed: int, available: int):
        super().__init__(f"{needed / 2**30:.2f} GiB needed, {available / 2**30:.2f} available")
        self.needed, self.available = needed, available  # bytes

    @classmethod
    def read(cls, message: str) -> "TooLarge | None":
        """Returns the error that the compiler's message states; None for any other message."""
        size = r"([\d.]+)([KMGT])"
        used = rf"Used {size} of {size} hbm|\({size}\) exceeds available HBM \({size}\)"
        found = re.search(used, message)
        if not found:
            return None
        number, unit, limit, of = filter(None, found.groups())
        power = {"K": 10, "M": 20, "G": 30, "T": 40}
        return cls(int(float(number) * 2 ** power[unit]), int(float(limit) * 2 ** power[of]))


def tpu_mesh(topology: str, axes: dict[str, int], chip: str = "v5e") -> Mesh:
    """Returns a mesh of compile-only devices: tpu_mesh("4x4", {"replica": 4, "fsdp": 4})."""
    description = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{CHIPS[chip].prefix}:{topology}"
    )
    count = int(np.prod(list(axes.values())))
    devices = np.array(description.devices[:count]).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def has_libtpu() -> bool:
    """Returns True if the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def tpu_devices(topology: str) -> tuple[str, list[jax.Device]]:
    """Returns the chip and the compile-only devices of a topology such as "v5e:16x16".

    Raises UserError for an unknown topology, or without libtpu.
    """
    chip, _, shape = topology.partition(":")
    if chip not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(
            f"topology {topology!r} is not CHIP:SHAPE, such as v5e:16x16, v6e:4x4 or v5p:2x2x2,"
            f" with one of the chips {', '.join(CHIPS)}"
        )
    if not has_libtpu():
        raise UserError("the TPU compiler libtpu is not installed: pip install 'jax[tpu]'")
    name = f"{CHIPS[chip].prefix}:{shape}"
    try:
        return chip, topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition(": ")[2] or str(error)
        raise UserError(f"topology {topology!r} does not exist: {reason}") from None


def write_no_schedules() -> None:
    """Switches schedules off, before libtpu is loaded: `memory` gets faster, `estimate` fails."""
    os.environ["LIBTPU_INIT_ARGS"] = _ARGS


def memory(fn: Callable[..., Any], *args: Any, **jit_options: Any) -> Memory:
    """Returns the memory of a program without costing it; arguments and errors as `estimate`."""
    return Memory.of(_compile(fn, *args, **jit_options))


def estimate(fn: Callable[..., Any], *args: Any, chip: str = "v5e", **jit_options: Any) -> Estimate:
    """Compiles `fn` for `args`, ShapeDtypeStructs with shardings over devices of a topology.

    Raises TooLarge for a program that does not fit into the chip's memory, and ValueError for a
    Pallas kernel whose cost is unknown.
    """
    # The schedules are the files that this compilation adds.
    before = set(_DUMP.iterdir())
    compiled = _compile(fn, *args, **jit_options)
    schedules = set(_DUMP.iterdir()) - before
    program = _Program(compiled.as_text(), schedules, CHIPS[chip])
    for path in schedules:
        path.unlink()

    # The costs, kernels listed among the operations.
    total = program.cost(program.entry)
    operations = Counter(total.operations)
    kernels = {name: (calls, program.kernels[name]) for name, calls in total.kernels.items()}
    for name, (calls, kernel) in kernels.items():
        operations[f"kernel {name}"] += calls * kernel.cycles
    return Estimate(
        chip=CHIPS[chip],
        operations=[(cycles, name) for name, cycles in operations.most_common()],
        cycles=sum(total.operations.values()),
        kernel_cycles=sum(calls * kernel.cycles for calls, kernel in kernels.values()),
        kernels=kernels,
        collectives=total.collectives,
        **vars(Memory.of(compiled)),
    )


def _compile(fn: Callable[..., Any], *args: Any, **jit_options: Any):
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)  # a hit would write no schedule
    try:
        fresh = functools.wraps(fn)(lambda *args: fn(*args))  # else a second call compiles nothing
        return jax.jit(fresh, **jit_options).lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        raise TooLarge.read(str(error)) or error from None
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


@dataclasses.dataclass
class _Cost:
    operations: Counter = dataclasses.field(default_factory=Counter)
    kernels: Counter = dataclasses.field(default_factory=Counter)
    collectives: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def add(self, other: "_Cost", times: int = 1):
        for name, cycles in other.operations.items():
            self.operations[name] += cycles * times
        for name, calls in other.kernels.items():
            self.kernels[name] += calls * times
        for kind, (count, size) in other.collectives.items():
            have = self.collectives.get(kind, (0, 0))
            self.collectives[kind] = (have[0] + count * times, have[1] + size * times)


_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\w*\[([\d,]*)\]")
_BITS = {"pred": 8, "bf16": 16}


def _array_bytes(text: str) -> int:
    """Returns the bytes of all array types in `text`."""
    bits = 0
    for dtype, sizes in _ARRAY.findall(text):
        count = int(np.prod([int(size) for size in sizes.split(",") if size] or [1]))
        bits += count * (_BITS.get(dtype) or int(dtype[1:]))
    return bits // 8


class _Program:
    """The text of a compiled program, walked computation by computation."""

    def __init__(self, text: str, schedules: set[Path], chip: Chip):
        self.computations: dict[str, list[str]] = {}
        self.kernels: dict[str, Kernel] = {}
        self.entry = name = ""
        types: dict[str, str] = {}
        calls = []  # (name, line) of every kernel
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head:
                name = head[2]
                self.computations[name] = []
                self.entry = name if head[1] else self.entry
            elif name and line.startswith("  "):
                self.computations[name].append(line)
                made = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ", line)
                if made:
                    types[made[1]] = made[2]
                if 'custom_call_target="tpu_custom_call"' in line:
                    calls.append((made[1], line))
        # The cost of every kernel. Identical kernels are scheduled once: those with a schedule
        # come first, and the others find its bundles by their body.
        bodies = {}
        for name, line in sorted(calls, key=lambda call: not _find(schedules, call[0])):
            body = re.search(r'"body":"([^"]*)"', line)[1]
            found = _find(schedules, name)
            if found:
                bodies[body] = scheduled_bundles(found.read_text())
            elif body not in bodies:
                raise ValueError(f"the compiler wrote no schedule of kernel {name}")
            operands = re.search(r"custom-call\((.*?)\)", line)[1]
            moved = types[name] + " ".join(types[o] for o in re.findall(r"%([\w.\-]+)", operands))
            declared = {
                key: int(re.search(rf'"{key}":"?(\d+)', line)[1]) if f'"{key}"' in line else 0
                for key in ("flops", "bytes_accessed")
            }
            moved = declared["bytes_accessed"] or _array_bytes(moved)
            self.kernels[name] = Kernel(
                bundles=bodies[body],
                compute=round(declared["flops"] / chip.flops_per_cycle),
                memory=round(moved * chip.hertz / chip.hbm_bytes_per_second),
            )

    def cost(self, computation: str) -> _Cost:
        """Returns the cost of a computation and of all that it calls."""
        total = _Cost()
        for line in self.computations.get(computation, ()):
            cycles = re.search(r'"estimated_cycles":"?(\d+)', line)
            if cycles:
                label = re.search(r'op_name="([^"]*)"', line)
                name = label[1] if label else line.strip().split(" = ")[0]
                total.operations[name] += int(cycles[1])
            if 'custom_call_target="tpu_custom_call"' in line:
                total.kernels[re.match(r"\s*(?:ROOT )?%([\w.\-]+)", line)[1]] += 1
            collective = _COLLECTIVE.search(line)
            if collective:
                entry = {collective[2]: (1, _array_bytes(collective[1]))}
                total.add(_Cost(collectives=entry))
            if " while(" in line:
                total.add(self.cost(_named(line, "body")), self._trips(line))
            elif " conditional(" in line:
                branches = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
                listed = re.search(r"branch_computations=\{([^}]*)\}", line)
                branches += re.findall(r"[\w.\-]+", listed[1]) if listed else []
                total.add(max(map(self.cost, branches), key=self._cycles))
            elif re.search(r" call\(| async-start\(", line):
                target = re.search(r"(?:to_apply|calls)=%?([\w.\-]+)", line)
                if target:
                    total.add(self.cost(target[1]))
        return total

    def _cycles(self, cost: _Cost) -> int:
        kernels = sum(calls * self.kernels[name].cycles for name, calls in cost.kernels.items())
        return kernels + sum(cost.operations.values())

    def _trips(self, line: str) -> int:
        """Returns the trips of a loop, or the largest constant in its condition."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        if known:
            return int(known[1])
        condition = "\n".join(self.computations[_named(line, "condition")])
        bounds = re.findall(r"s32\[\]\S* constant\((\d+)\)", condition)
        return max(map(int, bounds), default=1)


def _named(line: str, key: str) -> str:
    return re.search(rf"{key}=%?([\w.\-]+)", line)[1]


def _find(schedules: set[Path], name: str) -> Path | None:
    pattern = re.compile(rf"\d+-{re.escape(name)}-\d+-final_bundles\.txt")
    return next((path for path in schedules if pattern.fullmatch(path.name)), None)


_BUNDLE = re.compile(r"\n\s*(?:0x)?[0-9a-f]+\s+(?:[A-Z]{2})?\s*:")
_BRANCH = re.compile(r"sbr\.rel (?:\(!?(%\w+)\))?.*?target = \$region(\d+)")
_EXIT = re.compile(r"(%\w+) = scmp\.ge\.s32\.totalorder (%\w+), (\d+)[ ,]")
_DELAY_SLOTS = 4  # bundles after a branch that still belong to its loop


def scheduled_bundles(text: str) -> int:
    """Returns the instruction bundles that a kernel's final schedule executes, loops unrolled.

    A loop ends in a branch back to the start of its region, on a predicate that compares the
    loop's counter with its end, or that is constant for a loop of one trip. Raises
    ValueError for a loop of unknown length.
    """
    bundles = _BUNDLE.split(text)[1:]
    # Where every region starts, and the comparison of every predicate.
    starts = {}
    for i, bundle in enumerate(bundles):
        starts.update((region, i) for region in re.findall(r"Start region (\d+)", bundle))
    exits = {found[1]: found for found in _EXIT.finditer(text)}
    # A branch back multiplies the executions of all bundles of its loop.
    executions = np.ones(len(bundles), np.int64)
    for i, bundle in enumerate(bundles):
        for predicate, region in _BRANCH.findall(bundle):
            if starts.get(region, i + 1) <= i and f"{predicate} = pmov 1 " not in text:
                if predicate not in exits:
                    raise ValueError("a kernel's schedule holds a loop of unknown length")
                trips = _loop_trips(text, exits[predicate][2], int(exits[predicate][3]))
                executions[starts[region] : i + 1 + _DELAY_SLOTS] *= trips
    return int(executions.sum())


def _loop_trips(text: str, counter: str, end: int) -> int:
    """Returns the number of steps from the counter's start to `end`."""
    step = re.search(rf"{re.escape(counter)} = sadd\.s32 (\d+), (\S+?)[ ;,]", text)
    if not step:
        raise ValueError("a kernel's schedule holds a loop of unknown step")
    phi = re.search(rf"{re.escape(step[2])} = sphi (\S+?),", text)
    start = phi and re.search(rf"{re.escape(phi[1])} = smov (\d+)", text)
    return -(-(end - (int(start[1]) if start else 0)) // int(step[1]))
