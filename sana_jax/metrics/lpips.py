"""LPIPS (arXiv 1801.03924): the distance of two pictures in the features of a classifier.

Both pictures go through a tower of convolutions. After each of its five slices the features of a
pixel are divided by their norm, subtracted, squared, weighted per channel and averaged over the
pixels (equation 1). The norm is that of torchmetrics, whose gradients stay finite where all
features are zero. DC-AE is trained with the distance on VGG16 and measured with that on AlexNet.

The weights are those of torchvision's ImageNet classifier and of the linear heads in version 0.1 of
the lpips package. They are read from .safetensors or .pth files, in the names of either project:

    tower   features.N.weight, .bias           torchvision, timm
            net.sliceK.N.weight, .bias         a state dict of lpips.LPIPS or of taming's copy
    heads   linK.model.1.weight                lpips' vgg.pth and alex.pth, taming's, torchmetrics'
            lins.K.model.1.weight              a state dict of lpips.LPIPS
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from sana_jax.checkpoints.mapping import CONV, Entry
from sana_jax.checkpoints.pth import PthReader
from sana_jax.checkpoints.tensors import TensorReader
from sana_jax.models.layers import Dtype
from sana_jax.runtime.errors import UserError

# Mean and spread of ImageNet's pixels, in the range [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-8


class Conv(NamedTuple):
    """A convolution and its ReLU."""

    index: int  # in torchvision's `features`
    channels: int
    size: int = 3
    stride: int = 1
    padding: int = 1


class Tower(NamedTuple):
    """The slices of a classifier; features are taken after each of them."""

    pool: int  # the window of its maximum pooling, of stride 2
    slices: tuple[tuple[Conv | None, ...], ...]  # None: maximum pooling


def _vgg_slice(start: int, channels: int, count: int) -> tuple[Conv | None, ...]:
    convs = (Conv(start + 2 * i, channels) for i in range(count))
    return (None, *convs) if start else tuple(convs)


TOWERS = {
    "vgg": Tower(
        2,
        (
            _vgg_slice(0, 64, 2),
            _vgg_slice(5, 128, 2),
            _vgg_slice(10, 256, 3),
            _vgg_slice(17, 512, 3),
            _vgg_slice(24, 512, 3),
        ),
    ),
    "alex": Tower(
        3,
        (
            (Conv(0, 64, size=11, stride=4, padding=2),),
            (None, Conv(3, 192, size=5, padding=2)),
            (None, Conv(6, 384)),
            (Conv(8, 256),),
            (Conv(10, 256),),
        ),
    ),
}
SMALLEST = {"vgg": 16, "alex": 31}  # pixels a side that leave one feature in the last slice


def lpips(
    params: Any,
    x: Float[Array, "B H W 3"],
    y: Float[Array, "B H W 3"],
    *,
    tower: str,
    dtype: Dtype = jnp.float32,
) -> Float[Array, " B"]:
    """Returns the distance of every pair of images in [-1, 1].

    Args:
      params: the result of `load`.
      tower: "vgg" or "alex".
      dtype: that the convolutions compute in.

    The two batches go through the tower separately, so a gradient with respect to one costs nothing
    for the other. Raises ValueError for images that the tower pools to nothing.
    """
    if min(x.shape[1:3]) < SMALLEST[tower]:
        raise ValueError(f"LPIPS on {tower} needs images of {SMALLEST[tower]} pixels a side")
    pairs = zip(_slices(params, x, tower, dtype), _slices(params, y, tower, dtype), strict=True)
    distances = [
        jnp.mean(jnp.sum(head * (_unit(u) - _unit(v)) ** 2, axis=-1), axis=(1, 2))
        for head, (u, v) in zip(params["heads"], pairs, strict=True)
    ]
    return sum(distances)


def _slices(params: Any, x: Array, tower: str, dtype: Dtype) -> list[Array]:
    """Returns the features after every slice."""
    pool, slices = TOWERS[tower]
    x = (x.astype(jnp.float32) - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
    x, features = x.astype(dtype), []
    for layers in slices:
        for layer in layers:
            if layer is None:
                x = nn.max_pool(x, (pool, pool), (2, 2))
            else:
                kernel, bias = params["convs"][str(layer.index)]
                x = jax.lax.conv_general_dilated(
                    x,
                    kernel.astype(dtype),
                    (layer.stride, layer.stride),
                    [(layer.padding, layer.padding)] * 2,
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                )
                x = jax.nn.relu(x + bias.astype(dtype))
        features.append(x)
    return features


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + EPSILON)


def load(tower: str, weights: str | Path) -> Any:
    """Returns the parameters {"convs": {index: (kernel, bias)}, "heads": [(C,), ...]} in float32.

    `weights` is a .safetensors or .pth file, or two files with a comma between them, tower and
    heads. Raises UserError if a file cannot be read, and for tensors that are missing, of another
    shape or not finite.
    """
    tensors = {}
    for path in (Path(part).expanduser() for part in str(weights).split(",")):
        reader = PthReader if path.suffix in (".pth", ".pt") else TensorReader
        tensors |= dict.fromkeys((found := reader(path)), found)
    convs, heads, channels = {}, [], 3
    for k, layers in enumerate(TOWERS[tower].slices):
        for conv in filter(None, layers):
            names = f"features.{conv.index}", f"net.slice{k + 1}.{conv.index}"
            shape = conv.channels, channels, conv.size, conv.size
            kernel = _find(tensors, weights, [f"{n}.weight" for n in names], shape, CONV)
            bias = _find(tensors, weights, [f"{n}.bias" for n in names], shape[:1])
            convs[str(conv.index)] = kernel, bias
            channels = conv.channels
        names = f"lin{k}.model.1.weight", f"lins.{k}.model.1.weight"
        shape = 1, channels, 1, 1
        heads.append(_find(tensors, weights, names, shape, "1 c 1 1 -> c"))
    return {"convs": convs, "heads": heads}


def _find(
    tensors: Mapping[str, Any],
    weights: str | Path,
    names: list[str] | tuple[str, ...],
    shape: tuple[int, ...],
    pattern: str = "... -> ...",
) -> np.ndarray:
    """Returns the tensor that has one of these names. Raises UserError."""
    name = next((name for name in names if name in tensors), None)
    if name is None:
        what = "its linear heads" if names[0].startswith("lin") else "its tower of convolutions"
        raise UserError(
            f"LPIPS weights {weights} lack {' or '.join(names)}: where {what} lie in another file,"
            " give both with a comma between them"
        )
    found = tensors[name].shape(name)
    if found != shape:
        raise UserError(f"LPIPS weights {weights}: {name} has shape {found} instead of {shape}")
    return Entry(name, (name,), pattern).read(tensors[name], np.float32)
