"""A block with int8 products for TPU: between two kernels go int8 rows, or what is no row at all.

    modulated norm           -> int8 rows
    product                  -> q, k, v
    linear attention         -> int8 rows
    product, gate, sum       -> x, and its int8 rows
    product                  -> q
    attention to text        -> rows, which the product rounds
    product, sum, norm       -> x, and the int8 rows of its modulated norm
    two products             -> value and gate
    Mix-FFN's middle         -> rows, which the product rounds
    product, gate, sum       -> x

A kernel that is bound by HBM rounds its own result. One that is bound by its instructions would
gain nothing by it, and there the product has the whole rows anyway.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from sana_jax.kernels.cross_attention import tpu as cross_attention
from sana_jax.kernels.cross_attention.api import hidden_bias
from sana_jax.kernels.glumbconv import tpu as glumbconv
from sana_jax.kernels.glumbconv.api import by_halves
from sana_jax.kernels.int8.tpu import add_product, product
from sana_jax.kernels.linear_attention import tpu as linear_attention
from sana_jax.kernels.linear_attention.reference import EPSILON
from sana_jax.kernels.modulated_norm import tpu as modulated_norm

MIDDLE = "expand_bias", "depthwise_kernel", "depthwise_bias"  # of Mix-FFN


def forward(
    x: Float[Array, "B H W C"],
    modulation: Float[Array, "B 6 C"],
    keys_values: Float[Array, "B L C2"],
    mask: Bool[Array, "B L"],
    params: dict,
    *,
    head_dim: int,
    cross_heads: int,
) -> Float[Array, "B H W C"]:
    """Returns x after a block; `modulation` has the block's own table in it."""
    _, height, width, _ = x.shape
    x = rearrange(x, "b h w c -> b (h w) c")
    attention, to_text, ffn = (params[n] for n in ("attention", "cross_attention", "ffn"))
    shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=1)

    rows = modulated_norm.forward_rows(x, shift1, scale1)
    qkv = product(rows, *_weights(attention["qkv"]), x.dtype)
    if "q_norm" in attention:
        q, k, v = jnp.split(qkv, 3, axis=-1)
        q, k = (_rms_norm(t, attention[n]) for t, n in ((q, "q_norm"), (k, "k_norm")))
        qkv = jnp.concatenate([q, k, v], axis=-1)
    state = linear_attention.state(qkv, head_dim)
    rows = linear_attention.apply_rows(qkv, state, head_dim, EPSILON)
    x, rows = add_product(x, rows, *_weights(attention["out"]), gate1, "rows")

    q = product(rows, *_weights(to_text["q"]), x.dtype)
    if "q_norm" in to_text:
        q = _rms_norm(q, to_text["q_norm"])
    found = cross_attention.forward(q, keys_values, hidden_bias(mask), cross_heads)
    norm = dict(then="norm", modulation=(shift2, scale2))
    x, rows = add_product(x, found, *_weights(to_text["out"]), **norm)

    expand, middle = ffn["expand"]["kernel"], [ffn[name] for name in MIDDLE]
    hidden = expand.shape[1] // 2
    halves = (0, hidden), (hidden, 2 * hidden)
    images = (product(rows, expand, None, x.dtype, columns) for columns in halves)
    images = (rearrange(t, "b (h w) c -> b h w c", h=height, w=width) for t in images)
    found = rearrange(glumbconv.forward(*images, *by_halves(*middle)), "b h w c -> b (h w) c")
    x, _ = add_product(x, found, ffn["contract"]["kernel"], None, gate2)
    return rearrange(x, "b (h w) c -> b h w c", h=height, w=width)


def _weights(layer):
    return layer["kernel"], layer.get("bias")


def _rms_norm(x, params):
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5)
    return (y * params["scale"].astype(jnp.float32)).astype(x.dtype)
