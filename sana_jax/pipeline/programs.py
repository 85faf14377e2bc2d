"""Pure jitted functions that drawing, encoding data, training and measuring share.

A network is a static argument and its parameters are inputs: one compilation for each network and
shape. Inside another jit they add no boundary. Latents are scaled, as the sampler sees them.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int32, UInt8, UInt32

from sana_jax.models.gemma2 import Prefix
from sana_jax.pictures import to_float
from sana_jax.pipeline import tiling
from sana_jax.pipeline.tiling import LARGE
from sana_jax.text.prompts import gather_window


@partial(jax.jit, static_argnums=0, inline=True)
def read_prefix(module: nn.Module, params: Any, tokens: Int32[Array, "1 P"]) -> Prefix:
    """Returns the text encoder's keys and values of tokens that many texts begin with."""
    return module.apply({"params": params}, tokens, method="read_prefix")


@partial(jax.jit, static_argnums=0, inline=True)
def encode_text(
    module: nn.Module,
    params: Any,
    tokens: Int32[Array, "B L"],
    prefix: Prefix | None,
    window: Int32[Array, " rows"],
    mask: Bool[Array, "B rows"],
) -> Float[Array, "B rows C"]:
    """Returns the transformer's rows of texts after `prefix`, float32; see gather_window."""
    hidden = module.apply({"params": params}, tokens, prefix)
    return gather_window(hidden, window, mask, prefix and prefix.first)


@partial(jax.jit, static_argnums=0, inline=True)
def encode_padded(
    module: nn.Module, params: Any, tokens: Int32[Array, "B rows"], mask: Bool[Array, "B rows"]
) -> Float[Array, "B rows C"]:
    """Returns the rows of texts without an instruction, float32, those of padding too.

    NVlabs' code has the transformer see these, through the mask of another text.
    """
    return module.apply({"params": params}, tokens, None, mask).astype(jnp.float32)


@partial(jax.jit, static_argnums=0, inline=True)
def encode_images(
    module: nn.Module, params: Any, images: Float[Array, "B H W 3"]
) -> Float[Array, "B h w c"]:
    """Returns the latents of pixels in [-1, 1], in the autoencoder's dtype."""
    latents = module.apply({"params": params}, images, method="encode")
    return latents * module.config.scaling_factor


@partial(jax.jit, static_argnums=0)
def predict_velocity(
    module: nn.Module,
    params: Any,
    latents: Float[Array, "B h w c"],
    timestep: Float[Array, " B"],
    captions: Float[Array, "B L C"],
    mask: Bool[Array, "B L"],
    guidance: Float[Array, " #B"] | None = None,
) -> Float[Array, "B h w c"]:
    """Evaluates the transformer once, from the text's embeddings on."""
    keys_values = module.apply({"params": params}, captions, method="keys_values")
    inputs = latents, timestep, keys_values, mask, guidance
    return module.apply({"params": params}, *inputs, method="denoise")


@partial(jax.jit, static_argnums=0, static_argnames="devices")
def decode_latents(
    module: nn.Module, params: Any, latents: Float[Array, "B h w c"], devices: int = 1
) -> Float[Array, "B H W 3"]:
    """Returns pixels in about [-1, 1]. The batch is split over `devices`.

    Each device decodes as many pictures at once as have LARGE pixels, or one: for each pixel the
    autoencoder needs ten times the memory of the transformer.
    """
    decode = partial(module.apply, {"params": params}, method="decode")
    latents = latents / module.config.scaling_factor
    most = max(1, LARGE // (latents.shape[1] * latents.shape[2] * module.config.factor**2))
    return tiling.decode_in_groups(decode, latents, devices, most)


@partial(jax.jit, static_argnums=(1, 2))
def draw_noise(
    keys: UInt32[Array, "B 2"], shape: tuple[int, ...], steps: int | None = None
) -> Float[Array, "B ..."]:
    """Draws standard normal noise, each image from its own key: the high and low word of its seed.

    Seeds of one word give the noise of jax.random.key(seed). With `steps` there is noise for each
    of them, (B, steps, *shape): the first as without, the others by jax.random.fold_in(key, step).

    The generator is named here, or the environment's default would change the picture.
    """

    def draw(words):
        key = jax.random.wrap_key_data(words, impl="threefry2x32")
        if steps is None:
            return jax.random.normal(key, shape, jnp.float32)
        each = [key, *(jax.random.fold_in(key, step) for step in range(1, steps))]
        return jnp.stack([jax.random.normal(key, shape, jnp.float32) for key in each])

    with jax.threefry_partitionable(True):
        return jax.vmap(draw)(keys)


@jax.jit
def to_unit_range(images: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Maps [-1, 1] to [0, 1], clamped."""
    return jnp.clip(images * 0.5 + 0.5, 0, 1)


@jax.jit
def to_uint8(
    images: Float[Array, "B H W 3"],
) -> tuple[UInt8[Array, "B H W 3"], Bool[Array, " B"]]:
    """Maps [-1, 1] to 0 .. 255; also says which images were finite, which uint8 cannot show."""
    finite = jnp.isfinite(images).all(axis=(1, 2, 3))
    return jnp.round(to_unit_range(images) * 255).astype(jnp.uint8), finite


@jax.jit
def composite(
    drawn: Float[Array, "B H W 3"],
    pictures: UInt8[Array, "B H W 3"],
    masks: UInt8[Array, "B H W"],
) -> Float[Array, "B H W 3"]:
    """Returns pixels in [-1, 1]: the drawn ones where the mask is 255, the picture's where it is 0.

    Greys blend the two. Where the mask is 0, `to_uint8` gives the picture's bytes again.
    """
    mask, pictures = masks[..., None], to_float(pictures)
    share = mask.astype(jnp.float32) / 255
    return jnp.where(mask == 0, pictures, share * drawn + (1 - share) * pictures)


@partial(jax.jit, static_argnums=1)
def resize_and_crop(
    images: Float[Array, "B H W 3"], size: tuple[int, int]
) -> Float[Array, "B H2 W2 3"]:
    """Resizes to cover `size`, bilinear without smoothing, and crops the centre: as diffusers.

    diffusers' rounding error, which can lose a row, is not repeated.
    """
    batch, height, width, channels = images.shape
    scale = max(size[0] / height, size[1] / width)
    shape = [max(s, int(side * scale)) for s, side in zip(size, (height, width), strict=True)]
    images = jax.image.resize(images, (batch, *shape, channels), "linear", antialias=False)
    top, left = (shape[0] - size[0]) // 2, (shape[1] - size[1]) // 2
    return images[:, top : top + size[0], left : left + size[1]]
