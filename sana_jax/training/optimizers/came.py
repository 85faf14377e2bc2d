"""CAME: confidence-guided adaptive memory-efficient optimization (Luo et al., arXiv 2307.02047).

For a matrix with gradient g, in float32 (the paper's algorithm 2, without bias correction):

    V  = b2 V + (1 - b2) (g^2 + eps1)              kept as its mean over rows and over columns
    u  = g / sqrt(V),  u = u / max(1, RMS(u) / clip)
    m  = b1 m + (1 - b1) u
    S  = b3 S + (1 - b3) ((u - m)^2 + eps2)        the instability, kept as V is
    update = m / sqrt(S)

The two means stand for the rank-one matrix (mean over columns) (mean over rows) / mean over both.
As in the reference, a matrix is a parameter with two axes (dense layers, fused projections as one,
modulation tables) or a 1x1 convolution. Every other parameter (biases, norms, filters, depthwise or
not) keeps V in full, and its update is m. Stacked layers: see per_layer.py.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int8

PyTree = Any

BLOCK = 256  # numbers that share a scale, at most
MIN_QUANTISED = 16384  # a smaller parameter keeps its momentum in float32, as in the reference


class Factored(NamedTuple):
    """The means of a matrix over its last axis, and over its last axis but one."""

    rows: Float[Array, "*K I"]
    columns: Float[Array, "*K O"]


class Quantised(NamedTuple):
    """Numbers as scale times codes; a scale for each `block_size` numbers along the last axis."""

    codes: Int8[Array, "*K"]
    scale: Float[Array, "*J blocks"]


class Moments(NamedTuple):
    """The state of one parameter."""

    momentum: Float[Array, "*K"] | Quantised
    square: Float[Array, "*K"] | Factored
    instability: Factored | tuple[()]  # (): the parameter is no matrix


def came(
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    eps: tuple[float, float] = (1e-30, 1e-16),
    clip: float = 1.0,
    state_bits: int = 32,
) -> optax.GradientTransformation:
    """Returns CAME; its updates are to be scaled by the learning rate and subtracted.

    Args:
      b1, b2, b3: the decays of momentum, squares and instability.
      eps: eps1 and eps2 above.
      clip: the largest root mean square of u.
      state_bits: 8 keeps the momentum of large matrices as int8, with a float32 scale for each
        block; the means stay in float32.
    """

    def init(params):
        return jax.tree.map(zero_moments, params)

    def zero_moments(p):
        zeros = jnp.zeros_like(p, jnp.float32)
        matrix = is_matrix(p.shape)
        momentum = quantise(zeros) if state_bits == 8 and is_quantised(p.shape) else zeros
        return Moments(
            momentum, factor(zeros) if matrix else zeros, factor(zeros) if matrix else ()
        )

    def update(updates, state, params=None):
        grads, tree = jax.tree.flatten(updates)
        new = [
            step(g, moments) for g, moments in zip(grads, tree.flatten_up_to(state), strict=True)
        ]
        return tuple(map(tree.unflatten, zip(*new, strict=True))) if new else (updates, state)

    def step(gradient, old):
        g = gradient.astype(jnp.float32)
        square = average(old.square, g * g + eps[0], b2)
        u = g * inverse_root(square)
        u = u / jnp.maximum(1, jnp.sqrt(jnp.mean(u * u)) / clip)
        was_quantised = isinstance(old.momentum, Quantised)
        m = b1 * (dequantise(old.momentum) if was_quantised else old.momentum) + (1 - b1) * u
        direction, instability = m, ()
        if isinstance(old.instability, Factored):
            instability = average(old.instability, (u - m) ** 2 + eps[1], b3)
            direction = m * inverse_root(instability)
        moments = Moments(quantise(m) if was_quantised else m, square, instability)
        return direction.astype(gradient.dtype), moments

    return optax.GradientTransformation(init, update)


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Returns whether a parameter has factored moments: (in, out), or a 1x1 convolution."""
    return len(shape) == 2 or (len(shape) == 4 and shape[:2] == (1, 1))


def is_quantised(shape: tuple[int, ...]) -> bool:
    """Returns whether `state_bits=8` keeps this parameter's momentum in 8 bits."""
    # With blocks below 16 numbers, the scales would cost more than the codes save.
    return is_matrix(shape) and math.prod(shape) > MIN_QUANTISED and block_size(shape[-1]) >= 16


def block_size(width: int) -> int:
    """Returns the largest divisor of the last axis up to BLOCK, so no block spans two rows."""
    return max(size for size in range(1, BLOCK + 1) if width % size == 0)


def factor(x: Float[Array, "*K I O"]) -> Factored:
    """Returns the two means that are kept of a matrix."""
    return Factored(x.mean(-1), x.mean(-2))


def average(old: Array | Factored, new: Array, decay: float) -> Array | Factored:
    """Returns the moving average of a statistic, factored where `old` is."""
    new = factor(new) if isinstance(old, Factored) else new
    return jax.tree.map(lambda o, n: decay * o + (1 - decay) * n, old, new)


def inverse_root(x: Array | Factored) -> Array:
    """Returns x^(-1/2) by element; a factored x stands for its rank-one matrix."""
    if not isinstance(x, Factored):
        return jax.lax.rsqrt(x)
    rows = jax.lax.rsqrt(x.rows / x.rows.mean(-1, keepdims=True))
    return rows[..., :, None] * jax.lax.rsqrt(x.columns)[..., None, :]


def quantise(x: Float[Array, "*K"]) -> Quantised:
    """Rounds x to 255 steps between plus and minus the largest magnitude of each block."""
    size = block_size(x.shape[-1])
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    scale = jnp.abs(blocks).max(-1) / 127
    codes = jnp.round(blocks / jnp.where(scale > 0, scale, 1)[..., None])
    return Quantised(codes.astype(jnp.int8).reshape(x.shape), scale)


def dequantise(x: Quantised) -> Float[Array, "*K"]:
    """Returns the numbers that the codes stand for, in float32."""
    blocks = x.codes.reshape(*x.scale.shape, -1).astype(jnp.float32)
    return (blocks * x.scale[..., None]).reshape(x.codes.shape)
