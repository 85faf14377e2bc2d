"""The perceptual losses that a config chooses from, by name.

    lpips_vgg   LPIPS on VGG16, with which DC-AE was trained; needs published weights
    lpips_alex  LPIPS on AlexNet
    laplacian   the error in four octaves of detail, finest first; needs no weights
    none        0

    distance, params = make_perceptual("laplacian")
    loss = distance(params, reconstructions, images).mean()  # images in [-1, 1]

`params` is an argument of the distance so that a jitted step takes the weights as inputs, not as
constants of its program. They are never trained.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sana_jax.metrics import lpips
from sana_jax.models.layers import Dtype
from sana_jax.runtime.errors import UserError

Distance = Callable[[Any, Array, Array], Array]  # params, (B, H, W, 3) twice -> (B,)

BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def laplacian(
    reconstructions: Float[Array, "B H W C"], images: Float[Array, "B H W C"], levels: int = 4
) -> Float[Array, " B"]:
    """Returns the summed mean absolute errors of the bands of each image's Laplacian pyramid.

    A band is the part of the picture that a binomial blur removes; the next band is that of the
    blurred picture at half the size. With means instead of sums, this is the Lap1 loss of
    Bojanowski et al. (arXiv 1707.05776, section 3.2). It stands in for LPIPS. Unlike L1, it gives
    weight to detail, which L1 blurs; unlike LPIPS, it knows nothing of textures, and does not
    forgive a texture that is drawn a little elsewhere.

    Raises ValueError for sides of fewer than 2 ** levels pixels.
    """
    if min(images.shape[1:3]) < 2**levels:
        raise ValueError(f"a Laplacian pyramid of {levels} levels needs {2**levels} pixels a side")
    # Every band is linear, so the pyramid of the error is the error of the pyramids.
    error, total = reconstructions.astype(jnp.float32) - images, 0.0
    for _ in range(levels):
        low = _blur(_blur(error, 1), 2)
        total += jnp.mean(jnp.abs(error - low), axis=(1, 2, 3))
        error = low[:, ::2, ::2]
    return total


def _blur(x: Array, axis: int) -> Array:
    """Blurs with the binomial kernel along an axis, the border repeated."""
    size = x.shape[axis]
    padding = [(0, 0)] * x.ndim
    padding[axis] = (2, 2)
    padded = jnp.pad(x, padding, mode="edge")
    parts = [jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(5)]
    return sum(weight * part for weight, part in zip(BINOMIAL, parts, strict=True))


def _lpips(tower: str, weights: str | Path | None, dtype: Dtype) -> tuple[Distance, Any]:
    if not weights:
        raise UserError(
            f"perceptual loss lpips_{tower} needs its published weights: name the file, or choose"
            f" {' or '.join(STAND_INS)}, which need none"
        )
    return partial(lpips.lpips, tower=tower, dtype=dtype), lpips.load(tower, weights)


def _without_weights(name: str, distance: Distance, weights, dtype) -> tuple[Distance, Any]:
    del dtype  # the losses without weights compute in float32
    if weights:
        raise UserError(f"perceptual loss {name} takes no weights: leave {weights} out")
    return distance, {}


def _laplacian(params, reconstructions, images):
    return laplacian(reconstructions, images)


def _none(params, reconstructions, images):
    return jnp.zeros(images.shape[0])


STAND_INS = {"laplacian": _laplacian, "none": _none}
PERCEPTUAL = {f"lpips_{tower}": partial(_lpips, tower) for tower in lpips.TOWERS} | {
    name: partial(_without_weights, name, distance) for name, distance in STAND_INS.items()
}


def make_perceptual(
    name: str, weights: str | Path | None = None, dtype: Dtype = jnp.float32
) -> tuple[Distance, Any]:
    """Returns the (distance, params) of the loss `name`.

    Args:
      name: a key of PERCEPTUAL.
      weights: the files of weights, as metrics/lpips.py reads them.
      dtype: the type that the convolutions of LPIPS compute in.

    Raises:
      UserError: the name is unknown, or the weights are missing, unfit, or given to a loss that has
        none.
    """
    if name not in PERCEPTUAL:
        raise UserError(f"perceptual loss {name!r} is not one of {', '.join(PERCEPTUAL)}")
    return PERCEPTUAL[name](weights, dtype)
