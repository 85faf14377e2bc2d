"""LADD's discriminator (arXiv 2403.12015, section 3): heads on the tokens of a frozen teacher.

Each chosen block of the teacher (models/features.py) has a head, which is that of StyleGAN-T
(arXiv 2301.09515, section 3.2) and gives one logit a token:

    x = block(x, 1)                       (B, N, C)
    x = (x + block(x, 9)) / sqrt(2)
    logits = conv(x, 1)                   (B, N)

    block(x, taps) = leaky_relu(norm(conv(x, taps)), 0.2)

Convolutions run along the row of all tokens, whose ends meet, and have spectral norm: the kernel,
as a matrix of taps x C rows and a column an output, is divided by its largest singular value, which
one step of power iteration an update estimates. Its two vectors are the state of the collection
"spectral". The norm is batch norm over groups of at most 8 samples, always with the statistics of
the group itself: it has no running ones. It takes a bias away, so only the last convolution has
one; upstream's other biases train without effect.

Upstream starts the two vectors at random, so that the largest singular value is wrong, by a large
factor, until the discriminator's first steps; here they start after 15 steps of the iteration.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sana_jax.models.layers import Axes, Dtype, fan_in_uniform, partitioned
from sana_jax.runtime.errors import UserError
from sana_jax.sharding import constrain

STATE = "spectral"  # the collection of the power iterations
FIRST_ITERATIONS = 15
VIRTUAL_BATCH = 8
EPSILON = 1e-5
TAPS = 9


def _unit(v: Float[Array, " N"]) -> Float[Array, " N"]:
    return v / jnp.maximum(jnp.linalg.norm(v), 1e-12)


def _iterate(matrix: Float[Array, "M D"], right: Float[Array, " D"]) -> dict[str, Array]:
    """Returns better singular vectors of the largest singular value."""
    left = _unit(matrix @ right)
    return {"left": left, "right": _unit(left @ matrix)}


class SpectralConv(nn.Module):
    """A convolution along tokens, of an odd number of taps, circular, with spectral norm."""

    features: int
    taps: int
    axes: Axes
    use_bias: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], update: bool) -> Float[Array, "B N D"]:
        kernel_init = partitioned(fan_in_uniform, (None, *self.axes))
        shape = (self.taps, x.shape[-1], self.features)
        kernel = self.param("kernel", kernel_init, shape, self.param_dtype).astype(jnp.float32)
        kernel = kernel / self._largest(kernel.reshape(-1, self.features), update)
        edge = self.taps // 2
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (edge, edge), (0, 0)), mode="wrap")
        y = jax.lax.conv_general_dilated(
            x, kernel.astype(self.dtype), (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
        if self.use_bias:
            bias_init = partitioned(nn.initializers.zeros, self.axes[1:])
            y = y + self.param("bias", bias_init, shape[2:], self.param_dtype).astype(self.dtype)
        return y

    def _largest(self, matrix: Float[Array, "M D"], update: bool) -> Float[Array, ""]:
        """Returns the largest singular value, whose vectors are constants to gradients."""
        fixed = jax.lax.stop_gradient(matrix)

        def start():
            right = jax.random.normal(self.make_rng("params"), (self.features,))
            state = {"right": right}
            for _ in range(FIRST_ITERATIONS):
                state = _iterate(fixed, state["right"])
            return state

        state = self.variable(STATE, "vectors", start)
        if update and not self.is_initializing():
            state.value = _iterate(fixed, state.value["right"])
        return state.value["left"] @ matrix @ state.value["right"]


def groups_of(batch: int) -> int:
    """Returns how many groups of at most VIRTUAL_BATCH samples, all of one size, a batch makes.

    Raises UserError if it does not split so.
    """
    groups = -(-batch // VIRTUAL_BATCH)
    if batch % groups:
        raise UserError(
            f"the discriminator's norm takes groups of at most {VIRTUAL_BATCH}, and a batch of"
            f" {batch}, as a microbatch has it, does not split into {groups} of one size"
        )
    return groups


class VirtualBatchNorm(nn.Module):
    """Batch norm over the tokens of at most VIRTUAL_BATCH consecutive samples, in float32."""

    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        """Raises UserError for a batch that does not split into groups of one size."""
        groups, width = groups_of(len(x)), x.shape[-1]
        ones = partitioned(nn.initializers.ones, ("embed",))
        zeros = partitioned(nn.initializers.zeros, ("embed",))
        scale = self.param("scale", ones, (width,), self.param_dtype).astype(jnp.float32)
        bias = self.param("bias", zeros, (width,), self.param_dtype).astype(jnp.float32)
        group = x.astype(jnp.float32).reshape(groups, -1, width)
        mean = group.mean(axis=1, keepdims=True)
        variance = jnp.mean((group - mean) ** 2, axis=1, keepdims=True)
        group = (group - mean) * jax.lax.rsqrt(variance + EPSILON) * scale + bias
        return group.reshape(x.shape).astype(x.dtype)


class Head(nn.Module):
    """Maps the tokens after one block to a logit each."""

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], update: bool) -> Float[Array, "B N"]:
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        width = x.shape[-1]
        x = constrain(x.astype(self.dtype), "batch", None, "residual")

        def block(x, taps, name):
            conv = SpectralConv(width, taps, ("embed", "mlp"), name=f"conv_{name}", **types)
            norm = VirtualBatchNorm(self.param_dtype, name=f"norm_{name}")
            return jax.nn.leaky_relu(norm(conv(x, update)), 0.2)

        x = block(x, 1, "in")
        x = constrain((x + block(x, TAPS, "mix")) * 0.5**0.5, "batch", None, "residual")
        out = SpectralConv(1, 1, ("embed", None), use_bias=True, name="conv_out", **types)
        return out(x, update)[..., 0].astype(jnp.float32)


class Discriminator(nn.Module):
    """Maps a teacher's features to float32 logits: high where the latents look real.

    `variables = init(key, features)` has "params" and the state "spectral". A step that trains the
    discriminator applies it with update=True, mutable=["spectral"], and keeps the new state; one
    that trains the student applies it without, to gradients with respect to the features.
    """

    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, features: tuple[Float[Array, "B N C"], ...], update: bool = False
    ) -> Float[Array, "B K"]:
        """Returns the logits of every token of every block, K = blocks x N.

        Raises UserError for a batch of more than VIRTUAL_BATCH that does not split evenly.
        """
        types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        heads = [Head(name=f"head_{i}", **types) for i in range(len(features))]
        logits = [head(x, update) for head, x in zip(heads, features, strict=True)]
        return jnp.concatenate(logits, axis=1)
