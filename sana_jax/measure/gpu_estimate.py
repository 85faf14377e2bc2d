"""Bounds the time of a program on a GPU, without a GPU.

The bound of a launch is the longest of

    memory         the bytes it moves over the card's bandwidth
    compute        the FLOPs of its products over the peak of the tensor cores
    instructions   the instructions of its machine code over what the multiprocessors can issue, at
                   boost clock; only of kernels that XLA or Pallas compiled

and that of a program is the sum over its launches, as if the next began when one ends. It is an
account of the compiler's output and not a time: latency and launch overhead are not in it, nor
collectives. Every array counts as if it came from device memory, so where arrays stay in the L2
cache, as at small batches, a card may be faster than the bound by memory.
"""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from sana_jax.measure import gpu_machine_code, gpu_program
from sana_jax.measure.account import Memory
from sana_jax.measure.gpu_compile import Kernel, compile_program
from sana_jax.measure.gpu_machine_code import Code
from sana_jax.measure.gpu_program import Launch
from sana_jax.measure.gpu_targets import Card


@dataclasses.dataclass(frozen=True)
class Bound:
    """The bounds of a call of a launch, in seconds."""

    launch: Launch
    kernel: Kernel | None  # None for a call of a library, or a copy
    code: Code | None  # of the kernel
    bytes: int
    memory: float
    compute: float
    instructions: float

    @property
    def is_pallas(self) -> bool:
        """True for a kernel that is no fusion of XLA."""
        return self.code is not None and self.launch.kind.startswith("__")

    @property
    def roofline(self) -> float:
        """The longest bound without that by instructions."""
        return max(self.memory, self.compute)

    @property
    def seconds(self) -> float:
        """The longest bound."""
        return max(self.roofline, self.instructions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate(Memory):
    """The cost of a program on one card."""

    card: Card
    bounds: list[Bound]  # of each launch, the costliest first
    collectives: dict[str, tuple[int, int]]  # kind -> (executions, bytes of the results in all)

    def total(self, what: Callable[[Bound], float]) -> float:
        """Returns the sum over all calls."""
        return sum(bound.launch.calls * what(bound) for bound in self.bounds)

    @cached_property
    def launches(self) -> int:
        """The number of launches."""
        return sum(bound.launch.calls for bound in self.bounds)

    @cached_property
    def seconds(self) -> float:
        """The sum of all bounds, with instructions."""
        return self.total(lambda bound: bound.seconds)


def estimate(fn: Callable[..., Any], *args: Any, card: Card, **jit_options: Any) -> Estimate:
    """Compiles `fn` as gpu_compile.compile_program does, and bounds its time on `card`."""
    compiled = compile_program(fn, *args, **jit_options)
    program = gpu_program.read(compiled.hlo)
    texts = {kernel.ptx for kernel in compiled.kernels.values()}  # many launches share one
    with ThreadPoolExecutor() as pool:
        codes = dict(zip(texts, pool.map(gpu_machine_code.assemble, texts), strict=True))
    bounds = []
    for launch in program.launches:
        kernel = compiled.kernels.get(launch.name)
        bounds.append(bound(launch, kernel, codes[kernel.ptx] if kernel else None, card))
    bounds.sort(key=lambda x: x.launch.calls * x.seconds, reverse=True)
    return Estimate(
        card=card, bounds=bounds, collectives=program.collectives, **vars(compiled.memory)
    )


def bound(launch: Launch, kernel: Kernel | None, code: Code | None, card: Card) -> Bound:
    """Returns the bounds of a launch; what a kernel reads is at most what its instructions load."""
    read, instructions = launch.bytes_read, 0.0
    if kernel and code:
        instructions = code.seconds(kernel.launch, card)
        if code.loaded_bytes is not None:
            read = min(read, code.loaded_bytes * kernel.launch.blocks * kernel.launch.block_warps)
    moved = read + launch.bytes_written
    peak = card.peak_flops(launch.dtype, launch.highest)
    return Bound(
        launch=launch,
        kernel=kernel,
        code=code,
        bytes=moved,
        memory=moved / card.bytes_per_second,
        compute=launch.flops / peak,
        instructions=instructions,
    )
