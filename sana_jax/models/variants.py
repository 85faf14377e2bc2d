"""The parts that SANA replaced, for ablations: softmax attention and the plain MLP.

No published SANA has them. SANA (arXiv 2410.10629, table 8) compares a block of both, as of DiT
(arXiv 2212.09748), with its own of linear attention and Mix-FFN.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from sana_jax.models.layers import Dtype, dense
from sana_jax.sharding import constrain


def softmax_attention(qkv: Float[Array, "B N C3"], head_dim: int) -> Float[Array, "B N C"]:
    """Attends every token to every other: softmax(q k^T / sqrt(head_dim)) v, quadratic in N.

    `qkv` holds queries, keys and values side by side, and in each the heads side by side, as
    kernels/linear_attention has them. The softmax is float32.
    """
    parts = jnp.split(qkv, 3, axis=-1)
    q, k, v = (rearrange(t, "b n (h d) -> b n h d", d=head_dim) for t in parts)
    return rearrange(jax.nn.dot_product_attention(q, k, v), "b n h d -> b n (h d)")


def mlp_width(hidden: int) -> int:
    """Returns the hidden width of an MLP with the weights of a Mix-FFN of `hidden`.

    Mix-FFN's two products have 3 C hidden weights, the MLP's 2 C width: at SANA's ratio of 2.5 the
    MLP's is 3.75, near DiT's 4. The depthwise kernel, nine weights a channel, does not count.
    """
    return 3 * hidden // 2


class MLP(nn.Module):
    """Two products with a GELU (tanh) between them, token by token; in place of Mix-FFN.

    `hidden` is the Mix-FFN's: see `mlp_width`.
    """

    hidden: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], scale: Float[Array, "#B #H #W C"]
    ) -> Float[Array, "B H W C"]:
        """Returns the result, times `scale` in float32."""
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        channels = x.shape[-1]
        x = dense(mlp_width(self.hidden), ("embed", "mlp"), name="expand", **types)(x)
        x = jax.nn.gelu(x.astype(jnp.float32), approximate=True)
        x = dense(channels, ("mlp", "embed"), name="contract", **types)(x)
        x = constrain(x, "batch", "tokens", None, "residual")
        return (scale * x.astype(jnp.float32)).astype(self.dtype)
