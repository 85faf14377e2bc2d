"""A block with int8 products: the plain form or the kernels of tpu.py."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sana_jax.kernels.cross_attention import tpu as cross_attention
from sana_jax.kernels.dispatch import by_platform, over_mesh, plain_gradient, use_kernel
from sana_jax.kernels.glumbconv import tpu as glumbconv
from sana_jax.kernels.int8 import Quantised, is_quantised
from sana_jax.kernels.int8.tpu import supported
from sana_jax.kernels.int8_block import tpu
from sana_jax.kernels.linear_attention import tpu as linear_attention

# The layers whose products take int8 rows, all of them or none.
LAYERS = (
    ("attention", "qkv"),
    ("attention", "out"),
    ("cross_attention", "q"),
    ("cross_attention", "out"),
    ("ffn", "expand"),
    ("ffn", "contract"),
)


def takes(
    params: dict, x: Float[Array, "B H W C"], text_rows: int, head_dim: int, implementation: str
) -> bool:
    """Returns True if `int8_block` has kernels for this block, and `implementation` asks for them.

    Every layer of LAYERS is W8A8 with a scale for each row and has no LoRA beside it, numbers are
    bfloat16, and no mesh splits heads or tokens.
    """
    layers = [params.get(room, {}).get(name, {}) for room, name in LAYERS]
    if not all(map(_is_int8, layers)) or x.dtype != jnp.bfloat16:
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.shape["tensor"] * mesh.shape["sequence"] > 1:
        return False
    _, height, width, channels = x.shape
    fits = (
        glumbconv.supported(height, width, x.dtype.itemsize)
        and linear_attention.supported(channels, head_dim)
        and cross_attention.supported(text_rows, channels)
        and all(supported(*shape) for shape in _shapes(layers))
    )
    sizes = f"{height} x {width} tokens of width {channels} and {text_rows} text rows"
    reason = None if fits else sizes
    return use_kernel(implementation, "int8 block", x.dtype, tpu=reason, gpu="a GPU")


def _shapes(layers):
    """Yields inputs and outputs of the products; Mix-FFN's first is two."""
    for (_, name), layer in zip(LAYERS, layers, strict=True):
        inputs, outputs = layer["kernel"].shape
        yield inputs, outputs // 2 if name == "expand" else outputs


def _is_int8(layer: dict) -> bool:
    kernel = layer.get("kernel")
    dynamic = isinstance(kernel, Quantised) and kernel.rows == "int8" and kernel.range is None
    return dynamic and "lora" not in layer


def int8_block(
    plain: Callable,
    params: dict,
    x: Float[Array, "B H W C"],
    keys_values: Float[Array, "B L C2"],
    modulation: Float[Array, "#B 6 C"],
    mask: Bool[Array, "B L"],
    *,
    head_dim: int,
    cross_heads: int,
) -> Float[Array, "B H W C"]:
    """Returns plain(params, x, keys_values, modulation, mask), by kernels where there are some.

    Gradients are those of `plain`, which computes them from the start.
    """
    forward = partial(tpu.forward, head_dim=head_dim, cross_heads=cross_heads)

    def on_tpu(params, x, keys_values, modulation, mask):
        table = params["modulation_table"].astype(jnp.float32)[None] + modulation
        table = jnp.broadcast_to(table, (x.shape[0], *table.shape[1:]))
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty and mesh.shape["fsdp"] > 1:  # else every layer gathers all layers
            params = jax.tree.map(
                lambda x: x.alone() if is_quantised(x) else x, params, is_leaf=is_quantised
            )
        return over_mesh(forward, (x,), (table, keys_values, mask), (params,))

    @plain_gradient(plain)
    def run(*args):
        return by_platform(*args, plain=plain, tpu=on_tpu)

    return run(params, x, keys_values, modulation, mask)
