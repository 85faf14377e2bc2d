"""Inception-v3 (arXiv 1512.00567) as FID uses it: the weights of TensorFlow's graph of 2015-12-05.

That graph differs from torchvision's network: averages leave out what pads the border, and the last
block pools by the maximum. Batch norms are folded into the convolutions before them, so a layer is

    relu(x * kernel + bias)

A block applies chains of layers to the same input, and joins their results with a pooled input:

    block    input            chains of layers, and the pooled one
    5b 5c 5d 35 x 35          1x1 | 1x1 5x5 | 1x1 3x3 3x3 | mean 1x1
    6a       35 x 35          3x3/2 | 1x1 3x3 3x3/2 | max/2
    6b .. 6e 17 x 17          1x1 | 1x1 1x7 7x1 | 1x1 7x1 1x7 7x1 1x7 | mean 1x1
    7a       17 x 17          1x1 3x3/2 | 1x1 1x7 7x1 3x3/2 | max/2
    7b 7c    8 x 8            1x1 | 1x1 (1x3, 3x1) | 1x1 3x3 (1x3, 3x1) | mean or max 1x1

The 1x1 layers that begin chains are one product. A mean commutes with a 1x1 product, and is taken
after it, of fewer channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

SIDE = 299  # pixels of a picture
WIDTH = 2048  # features of a picture


class Layer(NamedTuple):
    """A convolution with a bias, and ReLU. Its padding keeps the size, unless it has a stride."""

    name: str
    features: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1


Chain = tuple[Layer | tuple[Layer, Layer], ...]  # a pair: both of the same input, joined


class Block(NamedTuple):
    """Chains of layers of one input, joined. pool: "mean" or "max", and its 1x1 layer, or None."""

    name: str
    chains: tuple[Chain, ...]
    pool: str
    pooled: Layer | None = None


def _a(name: str, pooled: int) -> Block:
    chains = (
        (Layer("branch1x1", 64),),
        (Layer("branch5x5_1", 48), Layer("branch5x5_2", 64, (5, 5))),
        (
            Layer("branch3x3dbl_1", 64),
            Layer("branch3x3dbl_2", 96, (3, 3)),
            Layer("branch3x3dbl_3", 96, (3, 3)),
        ),
    )
    return Block(name, chains, "mean", Layer("branch_pool", pooled))


def _c(name: str, narrow: int) -> Block:
    sizes = (7, 1), (1, 7), (7, 1), (1, 7)
    chains = (
        (Layer("branch1x1", 192),),
        (
            Layer("branch7x7_1", narrow),
            Layer("branch7x7_2", narrow, (1, 7)),
            Layer("branch7x7_3", 192, (7, 1)),
        ),
        (
            Layer("branch7x7dbl_1", narrow),
            *(
                Layer(f"branch7x7dbl_{i}", narrow if i < 5 else 192, size)
                for i, size in enumerate(sizes, 2)
            ),
        ),
    )
    return Block(name, chains, "mean", Layer("branch_pool", 192))


def _e(name: str, pool: str) -> Block:
    def pair(stem: str) -> tuple[Layer, Layer]:
        return Layer(f"{stem}a", 384, (1, 3)), Layer(f"{stem}b", 384, (3, 1))

    chains = (
        (Layer("branch1x1", 320),),
        (Layer("branch3x3_1", 384), pair("branch3x3_2")),
        (
            Layer("branch3x3dbl_1", 448),
            Layer("branch3x3dbl_2", 384, (3, 3)),
            pair("branch3x3dbl_3"),
        ),
    )
    return Block(name, chains, pool, Layer("branch_pool", 192))


# Published names; None: maximum pooling of stride 2. Layers of the stem without padding are marked.
STEM = (
    Layer("Conv2d_1a_3x3", 32, (3, 3), 2),
    Layer("Conv2d_2a_3x3", 32, (3, 3)),
    Layer("Conv2d_2b_3x3", 64, (3, 3)),
    None,
    Layer("Conv2d_3b_1x1", 80),
    Layer("Conv2d_4a_3x3", 192, (3, 3)),
    None,
)
SHRINKING = "Conv2d_2a_3x3", "Conv2d_4a_3x3"  # they compute inner pixels only
BLOCKS = (
    _a("Mixed_5b", 32),
    _a("Mixed_5c", 64),
    _a("Mixed_5d", 64),
    Block(
        "Mixed_6a",
        (
            (Layer("branch3x3", 384, (3, 3), 2),),
            (
                Layer("branch3x3dbl_1", 64),
                Layer("branch3x3dbl_2", 96, (3, 3)),
                Layer("branch3x3dbl_3", 96, (3, 3), 2),
            ),
        ),
        "max",
    ),
    _c("Mixed_6b", 128),
    _c("Mixed_6c", 160),
    _c("Mixed_6d", 160),
    _c("Mixed_6e", 192),
    Block(
        "Mixed_7a",
        (
            (Layer("branch3x3_1", 192), Layer("branch3x3_2", 320, (3, 3), 2)),
            (
                Layer("branch7x7x3_1", 192),
                Layer("branch7x7x3_2", 192, (1, 7)),
                Layer("branch7x7x3_3", 192, (7, 1)),
                Layer("branch7x7x3_4", 192, (3, 3), 2),
            ),
        ),
        "max",
    ),
    _e("Mixed_7b", "mean"),
    _e("Mixed_7c", "max"),
)


class InceptionV3(nn.Module):
    """Maps pictures to the features before the classifier, float32."""

    @nn.compact
    def __call__(self, x: Float[Array, "B 299 299 3"]) -> Float[Array, "B 2048"]:
        """`x` is on the network's scale: -1 is black, and 1 (or 127 / 128) is white."""
        for layer in STEM:
            if layer is None:
                x = _max_pool(x)
            else:
                x = Convolution(layer, name=layer.name)(x)
                x = x[:, 1:-1, 1:-1] if layer.name in SHRINKING else x
        for block in BLOCKS:
            x = _Mixed(block, name=block.name)(x)
        return x.mean(axis=(1, 2))


class Convolution(nn.Module):
    """One Layer."""

    layer: Layer

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B I J D"]:
        kernel, bias = self.weights(x.shape[-1])
        return jax.nn.relu(_convolve(x, kernel, self.layer.stride) + bias)

    @nn.compact
    def weights(self, channels: int) -> tuple[Float[Array, "K L C D"], Float[Array, " D"]]:
        shape = *self.layer.size, channels, self.layer.features
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        return kernel, self.param("bias", nn.initializers.zeros, shape[-1:])


class _Mixed(nn.Module):
    """One Block."""

    block: Block

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B I J D"]:
        block = self.block

        def layer(description: Layer) -> Convolution:
            return Convolution(description, name=description.name)

        # The first layers, as one product. The mean's is among them, the maximum's is not.
        firsts = [chain[0] for chain in block.chains if chain[0].size == (1, 1)]
        if block.pool == "mean":
            firsts.append(block.pooled)
        weights = [layer(first).weights(x.shape[-1]) for first in firsts]
        product = _convolve(x, jnp.concatenate([kernel for kernel, _ in weights], -1), 1)
        ends = [sum(first.features for first in firsts[:i]) for i in range(1, len(firsts))]
        found = dict(zip(firsts, jnp.split(product, ends, -1), strict=True))
        biases = {first: bias for first, (_, bias) in zip(firsts, weights, strict=True)}

        outs = []
        for first, *rest in block.chains:
            y = jax.nn.relu(found[first] + biases[first]) if first in found else layer(first)(x)
            for step in rest:
                if isinstance(step, Layer):
                    y = layer(step)(y)
                else:
                    y = jnp.concatenate([layer(each)(y) for each in step], -1)
            outs.append(y)
        if block.pooled is None:
            outs.append(_max_pool(x))
        elif block.pool == "mean":
            outs.append(jax.nn.relu(_mean_pool(found[block.pooled]) + biases[block.pooled]))
        else:
            outs.append(layer(block.pooled)(_max_pool(x, stride=1)))
        return jnp.concatenate(outs, -1)


def _convolve(
    x: Float[Array, "B H W C"], kernel: Float[Array, "K L C D"], stride: int
) -> Float[Array, "B I J D"]:
    """Cross-correlates with padding that keeps the size; without padding if there is a stride.

    XLA's CPU backend takes three times as long for a convolution without padding as for one with
    it, so there is padding always, and what it adds is cut off: here, or by the caller.
    """
    if stride == 1:
        padding = [(n // 2, n // 2) for n in kernel.shape[:2]]
    else:
        padding = [(2, 0), (2, 0)]  # of a stride of 2: one more row and column
    order = "NHWC", "HWIO", "NHWC"
    y = lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=order)
    return y if stride == 1 else y[:, 1:, 1:]


def _windows(x: Array, axis: int, stride: int) -> list[Array]:
    """Returns the three elements of every window of three along an axis, without padding."""
    count = (x.shape[axis] - 3) // stride + 1
    return [
        lax.slice_in_dim(x, i, i + stride * (count - 1) + 1, stride, axis=axis) for i in range(3)
    ]


def _max_pool(x: Float[Array, "B H W C"], stride: int = 2) -> Float[Array, "B I J C"]:
    """Takes the maximum of 3 x 3 pixels; with padding if the stride is 1."""
    # The padding is zero: every input comes from ReLU.
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))) if stride == 1 else x
    for axis in (1, 2):
        a, b, c = _windows(x, axis, stride)
        x = jnp.maximum(jnp.maximum(a, b), c)
    return x


def _mean_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Takes the mean of the up to 3 x 3 pixels around each that the picture has."""
    for axis in (1, 2):
        sides = [(1, 1) if i == axis else (0, 0) for i in range(4)]
        a, b, c = _windows(jnp.pad(x, sides), axis, 1)
        shape = [-1 if i == axis else 1 for i in range(4)]
        counts = jnp.full(x.shape[axis], 3.0).at[jnp.array([0, -1])].set(2.0)
        x = (a + b + c) / counts.reshape(shape)
    return x
