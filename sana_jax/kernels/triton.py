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
    kernel: Callable, operands: tuple[jax.Array, ...], out_shape, grid: tuple[int, ...], name: str
):
    """Runs `kernel` on a grid of programs of four warps, on references to whole arrays."""
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        name=name,
    )(*operands)
