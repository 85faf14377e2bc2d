"""What the kernels for GPU (Pallas Triton) share; only they and this file know that backend.

JAX 0.11 deprecates it, and warns whenever a kernel is lowered. Its successor, Mosaic GPU, does not
compile for an A100, so the kernels stay while JAX has Triton. When it has none, `AVAILABLE` is
False, and their operations take the plain form.
"""

import warnings
from collections.abc import Callable

import jax
from jax.experimental import pallas as pl

try:
    from jax.experimental.pallas import triton as plgpu
except ImportError:
    plgpu = None

AVAILABLE = plgpu is not None
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)


def call(
    kernel: Callable,
    operands: tuple[jax.Array, ...],
    out_shape,
    grid: tuple[int, ...],
    name: str,
    *,
    warps: int = 4,
    stages: int = 2,
):
    """Runs `kernel` on a grid of programs of so many warps, on references to whole arrays."""
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        name=name,
    )(*operands)
