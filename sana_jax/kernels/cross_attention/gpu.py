"""Softmax attention to text rows for GPU: cuDNN's, which keeps the logits on the chip.

cuDNN takes the number of rows that each text has, in place of a mask: the visible rows must stand
before the hidden ones. Those of a prompt do, since it is padded on the right; `visible_first` in
api.py puts others there. cuDNN multiplies in bfloat16 or float16, and sums in float32.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Int32

IMPLEMENTATION = "cudnn"  # tests on a CPU read "xla": the same function by the same arguments


def forward(q, kv, mask, heads):
    """Returns the attention of q (B, N, C) to kv (B, L, 2 C), of which mask (B, L) hides the end.

    kv may be a pair of keys and values, (B, L, C) each.
    """
    k, v = kv if isinstance(kv, tuple) else jnp.split(kv, 2, axis=-1)
    q, k, v = (rearrange(t, "b n (h d) -> b n h d", h=heads) for t in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths(mask), implementation=IMPLEMENTATION
    )
    return rearrange(out, "b n h d -> b n (h d)")


def lengths(mask: Bool[Array, "B L"]) -> Int32[Array, " B"]:
    """Returns the number of visible rows; of a text without any, all rows, as reference.py does.

    There every row loses the same 1e4, which a softmax does not see.
    """
    visible = jnp.sum(mask, axis=1, dtype=jnp.int32)
    return jnp.where(visible == 0, mask.shape[1], visible)


def unsupported(q, kv, mask, heads) -> str | None:
    """Returns JAX's own reason why cuDNN does not take these arrays, or None."""
    try:
        jax.eval_shape(lambda *args: forward(*args, heads), q, kv, mask)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return f"{q.dtype}, or for heads of {q.shape[-1] // heads} ({error})"
    return None
