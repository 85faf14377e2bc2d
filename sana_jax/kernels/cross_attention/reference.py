"""Softmax attention from tokens to text rows in plain jnp: the specification of the kernel.

    logits = q k^T / sqrt(D), minus 1e4 where the mask is False
    out = softmax(logits) v

The 1e4 is finite because a softmax over hidden rows only must stay finite.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from sana_jax.kernels.mixed_einsum import einsum_float32

HIDDEN = -1e4


def cross_attention(
    q: Float[Array, "B N C"],
    kv: Float[Array, "B L C2"] | tuple[Float[Array, "B L C"], Float[Array, "B L C"]],
    mask: Bool[Array, "B L"],
    heads: int,
) -> Float[Array, "B N C"]:
    """Returns the result in q's dtype, from float32 sums and softmax; `kv` is [keys | values]."""
    k, v = kv if isinstance(kv, tuple) else jnp.split(kv, 2, axis=-1)
    q, k, v = (rearrange(t, "b n (h d) -> b n h d", h=heads) for t in (q, k, v))
    logits = einsum_float32("bnhd,blhd->bhnl", q, k) * q.shape[-1] ** -0.5
    logits = logits + jnp.where(mask, 0.0, HIDDEN)[:, None, None, :]
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    out = einsum_float32("bhnl,blhd->bnhd", weights, v).astype(q.dtype)
    return rearrange(out, "b n h d -> b n (h d)")
