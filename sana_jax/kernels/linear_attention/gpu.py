"""ReLU linear attention for GPU (Pallas Triton), forward and backward; tpu.py has the formulas.

A program takes one head: it loops over tokens to sum a state, and takes one block of tokens to use
a state. The tokens of few images are split over several programs, whose sums XLA adds up. `state`
is the (2 D, C) of tpu.py: S above T.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from sana_jax.kernels import triton
from sana_jax.kernels.block_sizes import GPU
from sana_jax.kernels.triton import plgpu

PROGRAMS = GPU["linear_attention_programs"]  # at least, of a sum over tokens


def supported(head_dim: int) -> bool:
    """Returns True if a head is a tile of the tensor cores, and JAX has the compiler."""
    return triton.AVAILABLE and head_dim in (16, 32, 64, 128)


def state(qkv, head_dim):
    """Returns S and T of (B, N, 3 C), (B, 2 D, C) in float32; this and the others as in tpu.py."""
    return _call(_state_kernel, (qkv,), head_dim, "state", name="state")


def apply(qkv, total, head_dim, epsilon):
    """Returns every query's average of the values, (B, N, C)."""
    kernel = partial(_apply_kernel, epsilon=epsilon)
    return _call(kernel, (qkv, total), head_dim, "rows", name="apply")


def state_cotangent(qkv, total, cotangent, head_dim, epsilon):
    """Returns the cotangent of the state, (B, 2 D, C) in float32."""
    kernel = partial(_state_cotangent_kernel, epsilon=epsilon)
    operands = (qkv, total, cotangent)
    return _call(kernel, operands, head_dim, "state", name="state_cotangent")


def cotangents(qkv, total, total_cotangent, cotangent, head_dim, epsilon):
    """Returns the cotangents of q, k and v, side by side, (B, N, 3 C)."""
    kernel = partial(_cotangents_kernel, epsilon=epsilon)
    operands = (qkv, total, total_cotangent, cotangent)
    return _call(kernel, operands, head_dim, "qkv", name="cotangents")


def _call(kernel, operands, head_dim, out, *, name):
    qkv = operands[0]
    batch, tokens, channels = qkv.shape
    channels //= 3
    block = GPU["linear_attention"][qkv.dtype.itemsize]
    heads, blocks = channels // head_dim, pl.cdiv(tokens, block)
    parts = 1
    while out == "state" and batch * heads * parts < PROGRAMS and parts < blocks:
        parts *= 2
    shape, dtype = {
        "state": ((batch * parts, 2 * head_dim, channels), jnp.float32),
        "rows": ((batch, tokens, channels), qkv.dtype),
        "qkv": (qkv.shape, qkv.dtype),
    }[out]
    kernel = partial(kernel, head_dim=head_dim, channels=channels, tokens=tokens, block=block)
    out_shape = jax.ShapeDtypeStruct(shape, dtype)
    # Neighbouring heads run at the same time: of two in bfloat16, a line of the cache holds both.
    grid = (heads, parts if out == "state" else blocks, batch)
    found = triton.call(kernel, operands, out_shape, grid, f"linear_attention_{name}")
    return found if parts == 1 else jnp.sum(found.reshape(batch, parts, *shape[1:]), axis=1)


def _dot(x, y, dtype, *, transpose_x=False, transpose_y=False):
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return plgpu.dot(
        x.astype(dtype), y.astype(dtype), transpose_x, transpose_y, precision=precision
    ).astype(jnp.float32)


class _Head:
    """Loads and stores the blocks of one head of one image."""

    def __init__(self, head_dim, channels, tokens, block):
        self.head, self.part, self.image = (pl.program_id(i) for i in range(3))
        self.head_dim, self.channels, self.tokens, self.size = head_dim, channels, tokens, block

    def valid(self, block):
        """Returns True for the tokens of a block that are there, (size, 1)."""
        return (block * self.size + jnp.arange(self.size) < self.tokens)[:, None]

    def _rows(self, block, part):
        first = part * self.channels + self.head * self.head_dim
        rows = pl.ds(block * self.size, self.size)
        mask = jnp.broadcast_to(self.valid(block), (self.size, self.head_dim))
        return (self.image, rows, pl.ds(first, self.head_dim)), mask

    def load(self, ref, block, part=0):
        """Returns q (part 0), k or v of a block, (size, D), zero behind the last token."""
        where, mask = self._rows(block, part)
        return plgpu.load(ref.at[where], mask=mask, other=0.0)

    def store(self, ref, block, value, part=0):
        """Stores (size, D) up to the last token."""
        where, mask = self._rows(block, part)
        plgpu.store(ref.at[where], value.astype(ref.dtype), mask=mask)

    def state(self, ref, part):
        """Returns S (part 0) or T (part 1), (D, D)."""
        rows, columns = pl.ds(part * self.head_dim, self.head_dim), self._columns()
        return plgpu.load(ref.at[self.image, rows, columns])

    def store_state(self, ref, part, value):
        """Stores this program's part of S (part 0) or T (part 1), (D, D)."""
        rows, columns = pl.ds(part * self.head_dim, self.head_dim), self._columns()
        image = self.image * pl.num_programs(1) + self.part
        plgpu.store(ref.at[image, rows, columns], value)

    def _columns(self):
        return pl.ds(self.head * self.head_dim, self.head_dim)

    def sum_states(self, products):
        """Sums pairs of (D, D) products over this program's part of the blocks of tokens."""

        def step(block, sums):
            return tuple(s + p for s, p in zip(sums, products(block), strict=True))

        zero = jnp.zeros((self.head_dim, self.head_dim), jnp.float32)
        parts = pl.num_programs(1)
        blocks = (pl.cdiv(self.tokens, self.size) + parts - 1) // parts
        first = self.part * blocks  # behind the last token, blocks are zero
        return jax.lax.fori_loop(first, first + blocks, step, (zero, zero))


def _relu(x):
    return jnp.maximum(x, jnp.zeros_like(x))


def _state_kernel(qkv_ref, out_ref, **sizes):
    head, dtype = _Head(**sizes), qkv_ref.dtype

    def products(block):
        k, v = _relu(head.load(qkv_ref, block, 1)), head.load(qkv_ref, block, 2)
        return tuple(_dot(k, x, dtype, transpose_x=True) for x in (v, jnp.ones_like(v)))

    for part, value in enumerate(head.sum_states(products)):
        head.store_state(out_ref, part, value)


def _quotient(head, q, state_ref, epsilon):
    """Returns q S / (q T + epsilon), the denominator, S and T."""
    s, t = head.state(state_ref, 0), head.state(state_ref, 1)
    # In this order: the other one spilled registers on an A100, or took three times as many.
    numerator, denominator = _dot(q, s, q.dtype), _dot(q, t, q.dtype) + epsilon
    return numerator / denominator, denominator, s, t


def _apply_kernel(qkv_ref, state_ref, out_ref, *, epsilon, **sizes):
    head, block = _Head(**sizes), pl.program_id(1)
    q = _relu(head.load(qkv_ref, block))
    head.store(out_ref, block, _quotient(head, q, state_ref, epsilon)[0])


def _output_cotangents(head, block, q, state_ref, cotangent_ref, epsilon):
    """Returns the cotangents of q S and q T, zero behind the last token, and S and T."""
    out, denominator, s, t = _quotient(head, q, state_ref, epsilon)
    d_numerator = head.load(cotangent_ref, block).astype(jnp.float32) / denominator
    d_numerator = jnp.where(head.valid(block), d_numerator, 0.0)
    return d_numerator, jnp.where(head.valid(block), -d_numerator * out, 0.0), s, t


def _state_cotangent_kernel(qkv_ref, state_ref, cotangent_ref, out_ref, *, epsilon, **sizes):
    head, dtype = _Head(**sizes), qkv_ref.dtype

    def products(block):
        q = _relu(head.load(qkv_ref, block))
        both = _output_cotangents(head, block, q, state_ref, cotangent_ref, epsilon)[:2]
        return tuple(_dot(q, d, dtype, transpose_x=True) for d in both)

    for part, value in enumerate(head.sum_states(products)):
        head.store_state(out_ref, part, value)


def _cotangents_kernel(
    qkv_ref, state_ref, d_state_ref, cotangent_ref, out_ref, *, epsilon, **sizes
):
    head, block, dtype = _Head(**sizes), pl.program_id(1), qkv_ref.dtype
    q, k, v = (head.load(qkv_ref, block, part) for part in range(3))
    d_numerator, d_denominator, s, t = _output_cotangents(
        head, block, _relu(q), state_ref, cotangent_ref, epsilon
    )
    d_s, d_t = head.state(d_state_ref, 0), head.state(d_state_ref, 1)
    transposed = dict(transpose_y=True)
    d_q = _dot(d_numerator, s, dtype, **transposed) + _dot(d_denominator, t, dtype, **transposed)
    d_k = _dot(v, d_s, dtype, **transposed) + _dot(jnp.ones_like(v), d_t, dtype, **transposed)
    d_v = _dot(_relu(k), d_s, dtype)
    head.store(out_ref, block, jnp.where(q > 0, d_q, 0.0), 0)
    head.store(out_ref, block, jnp.where(k > 0, d_k, 0.0), 1)
    head.store(out_ref, block, d_v, 2)
