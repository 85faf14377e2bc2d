"""Compiles for NVIDIA GPUs that are not here, by the CUDA compiler of JAX's plugin.

The plugin (pip install 'jax[cuda13]', on x86-64 Linux) needs no driver to compile for a card that
is described to it. Everything runs but the autotuner, which times kernels on a card: so products
are calls of cuBLASLt here, and which of its kernels a card would take, or whether a Triton kernel
of XLA's own, is not known. The same holds for convolutions in cuDNN and for their scratch memory.
"""

import functools
import importlib.util
import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from sana_jax.measure.account import Memory
from sana_jax.measure.gpu_machine_code import Launched, tool
from sana_jax.measure.gpu_targets import CARDS, Card, target_config
from sana_jax.runtime.errors import UserError

INSTALL = "pip install -e '.[gpu-compile]', on x86-64 Linux"
HOST_CARDS = 8  # more are several hosts of so many


def has_compiler() -> bool:
    """Returns True if the CUDA plugin of JAX is installed."""
    return importlib.util.find_spec("jax_cuda13_plugin") is not None


def gpu_devices(topology: str) -> tuple[Card, list[jax.Device]]:
    """Returns the card and the compile-only devices of a topology such as "h100:8".

    Raises UserError for an unknown topology, or without the compiler.
    """
    name, _, count = topology.partition(":")
    if name not in CARDS or not re.fullmatch(r"[1-9]\d{0,3}", count):
        raise UserError(
            f"topology {topology!r} is not CARD:COUNT, such as h100:1 or h100:8, with one of the"
            f" cards {', '.join(CARDS)}"
        )
    hosts, rest = divmod(int(count), HOST_CARDS)
    if hosts and rest:
        raise UserError(f"topology {topology!r}: more than {HOST_CARDS} cards are hosts of so many")
    if not has_compiler():
        raise UserError(f"the CUDA compiler is not installed: {INSTALL}")
    for program in ("ptxas", "nvdisasm"):
        if tool(program) is None:
            raise UserError(f"{program} is not installed: {INSTALL}")
    shape = f"1x{hosts}x{HOST_CARDS}" if hosts else f"1x1x{count}"
    made = topologies.get_topology_desc(
        "", "cuda", target_config=target_config(CARDS[name]), topology=shape
    )
    return CARDS[name], made.devices


class Kernel(NamedTuple):
    """A kernel that XLA compiled, and the size of its launch."""

    ptx: str
    launch: Launched


class Compiled(NamedTuple):
    """A compiled program."""

    memory: Memory
    hlo: str  # optimised
    kernels: dict[str, Kernel]  # by the name of the HLO instruction that launches it


def compile_program(fn: Callable[..., Any], *args: Any, **jit_options: Any) -> Compiled:
    """Compiles `fn` for `args`, ShapeDtypeStructs with shardings over devices of a topology.

    A mesh of these devices has to be set: it names the card that a Pallas kernel is lowered for.
    """
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)  # a hit would dump nothing
    try:
        with tempfile.TemporaryDirectory(prefix="sana_jax_gpu_") as folder:
            options = {
                "xla_dump_to": folder,
                "xla_dump_emitter_re": "ptx",  # without it, jax 0.11 dumps no PTX
                "xla_gpu_enable_triton_gemm": False,
            }
            fresh = functools.wraps(fn)(lambda *args: fn(*args))  # else a second call is a hit
            lowered = jax.jit(fresh, **jit_options).lower(*args)
            made = lowered.compile(compiler_options=options)
            return Compiled(Memory.of(made), made.as_text(), kernels(Path(folder)))
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def kernels(folder: Path) -> dict[str, Kernel]:
    """Returns the kernels of XLA's dump, by the HLO instruction that launches them."""
    ptx = {}
    for path in folder.glob("*.ptx"):
        text = path.read_text()
        ptx |= dict.fromkeys(re.findall(r"\.entry (\w+)\(", text), text)
    found = {}
    for path in folder.glob("*.thunk_sequence.txt"):
        metadata = path.with_name(path.name.replace("thunk_sequence", "thunk_metadata"))
        names = dict((int(number), name) for name, number in _THUNK.findall(metadata.read_text()))
        for number, entry, grid, threads, shared in _LAUNCH.findall(path.read_text()):
            blocks, threads = (math.prod(map(int, x.split(","))) for x in (grid, threads))
            if int(number) in names and entry in ptx:
                launch = Launched(blocks, threads, int(shared))
                found[names[int(number)]] = Kernel(ptx[entry], launch)
    return found


_THUNK = re.compile(r'profile_annotation: "([^"]*)"\s+thunk_id: (\d+)')
_LAUNCH = re.compile(
    r"^\s*(\d+): k\w+ +\[[^\]]*\] (\w+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\]"
    r" +shared_memory: (\d+)",
    re.MULTILINE,
)
