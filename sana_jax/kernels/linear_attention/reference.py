"""ReLU linear attention in plain jnp: the specification of the kernel.

    state = sum_n relu(k_n) v_n^T        (D, D)
    total = sum_n relu(k_n)              (D,)
    out_n = relu(q_n) state / (relu(q_n) . total + epsilon)

SANA (arXiv 2410.10629, section 2.3, eq. 1): linear in the number of tokens N, no softmax, no scale.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sana_jax.kernels.mixed_einsum import einsum_float32

EPSILON = 1e-15  # diffusers'


def linear_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    epsilon: float = EPSILON,
    axis_name: str | None = None,
) -> Float[Array, "B N H D"]:
    """Attends every token to every other; sums and division in float32, result in v's dtype.

    A row whose q is zero everywhere gives zero, not NaN.
    `axis_name` is the mesh axis that splits the tokens, under shard_map.
    """
    q, k = jax.nn.relu(q), jax.nn.relu(k)
    state = einsum_float32("bnhd,bnhe->bhde", k, v)  # (B, H, D, D)
    total = jnp.sum(k, axis=1, dtype=jnp.float32)  # (B, H, D)
    if axis_name:
        state, total = jax.lax.psum((state, total), axis_name)
    q = q.astype(jnp.float32)
    # By default, TPUs would round the float32 sums to bfloat16 first.
    exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    numerator = exact("bnhd,bhde->bnhe", q, state)
    denominator = exact("bnhd,bhd->bnh", q, total)
    return (numerator / (denominator[..., None] + epsilon)).astype(v.dtype)
