"""The denoising loop: network, guidance and sampler in one dispatch.

Networks are static arguments and parameters are inputs, so all pipelines of a process share one
compilation for each network, batch, size and number of steps. The caption's embedding and the keys
and values of cross-attention depend on the prompt alone and are computed before the loop.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float

from sana_jax.diffusion import dpm_solver
from sana_jax.diffusion.guidance import guide
from sana_jax.diffusion.inpainting import Kept, keep
from sana_jax.kernels.cross_attention import visible_first
from sana_jax.kernels.dispatch import platform
from sana_jax.kernels.int8 import part
from sana_jax.models.layers import IN_PLACE, unstack

# Of a deeper network, a second copy of the weights would be too large beside the first.
MOST_UNROLLED_LAYERS = 32


@partial(jax.jit, static_argnames="module")
def keys_values_of(
    module: nn.Module, params: Any, captions: Float[Array, "B S L T"]
) -> Float[Array, "depth B S L C2"]:
    """Returns the keys and values of all blocks' cross-attention for S captions an image."""
    halves = captions.shape[1]
    captions = rearrange(captions, "b s l t -> (b s) l t")
    keys_values = module.apply({"params": params}, captions, method="keys_values")
    return rearrange(keys_values, "n (b s) l c -> n b s l c", s=halves)


@partial(jax.jit, static_argnames=("module", "sequential"))
def sample(
    module: nn.Module,
    params: Any,
    noise: Float[Array, "B h w c"],
    schedule: dpm_solver.Schedule,
    captions: Float[Array, "B S L T"],
    masks: Bool[Array, "B S L"],
    scale: Float[Array, "B 1 1 1"],
    interval: tuple[Array, Array] | None,
    sequential: bool,
    kept: Kept | None = None,
    fresh: Float[Array, "B steps h w c"] | None = None,
) -> Float[Array, "B h w c"]:
    """Returns latents from noise. S is 2 (without and with the prompt), or 1 for no guidance.

    `noise` is the state at the schedule's first sigma, which may have a picture in it.
    `sequential`: compute the two one after the other, in less memory. `scale`, `interval`: see
    diffusion/guidance.py; Sprint's networks read the scale themselves, and S is 1. `kept`: see
    diffusion/inpainting.py. `fresh`: see `dpm_solver.solve`.
    """
    params, keys_values, masks = _prepare(module, params, captions, masks)
    velocity = _velocity(module, params, keys_values, masks, scale, interval, sequential, kept)
    return dpm_solver.solve(velocity, noise, schedule, fresh)


def sample_slowly(
    on_step,
    module,
    params,
    noise,
    schedule,
    captions,
    masks,
    *guidance,
    sequential,
    kept=None,
    fresh=None,
):
    """Samples like `sample`, one dispatch per step, and calls on_step(step, latents) after each."""
    params, keys_values, masks = _prepare(module, params, captions, masks)
    carry = noise, jnp.zeros_like(noise)
    for i in range(len(schedule.sigma)):
        row = jax.tree.map(lambda column, i=i: column[i], schedule)
        arguments = module, params, carry, row, keys_values, masks, *guidance
        added = fresh if fresh is None else fresh[:, i]
        carry = _step(*arguments, sequential=sequential, kept=kept, fresh=added)
        on_step(i, carry[0])
    return carry[0]


def _prepare(module, params, captions, masks):
    """Returns the network's weights, its keys and values, and masks, as its steps read them best.

    On accelerators that means each layer's arrays by themselves: from a stack, every step would
    copy them. One copy a call remains, but of weights for int8 rows on a TPU, whose kernels read
    them in the stack. For cuDNN, on a GPU, visible rows come first, and keys and values are a pair.
    """
    on = platform()
    if on == "gpu":
        captions, masks = visible_first(captions, masks)
    keys_values = keys_values_of(module, params, captions)
    if on in ("gpu", "tpu") and module.config.depth <= MOST_UNROLLED_LAYERS:
        blocks, whole = params["blocks"], {}
        if on == "tpu":
            blocks, values = part(blocks)
            whole = {IN_PLACE: values}
        blocks, keys_values = _by_layer(blocks, keys_values, pairs=on == "gpu")
        params = {**params, "blocks": blocks | whole}
    return params, keys_values, masks


@partial(jax.jit, static_argnames="pairs")
def _by_layer(blocks, keys_values, pairs):
    layers = unstack(keys_values)
    if pairs:
        layers = {name: tuple(jnp.split(kv, 2, -1)) for name, kv in layers.items()}
    return unstack(blocks), layers


@partial(jax.jit, static_argnames=("module", "sequential"))
def _step(module, params, carry, row, keys_values, masks, scale, interval, sequential, kept, fresh):
    velocity = _velocity(module, params, keys_values, masks, scale, interval, sequential, kept)
    return dpm_solver.step(velocity, carry, row, fresh)


def _velocity(module, params, keys_values, masks, scale, interval, sequential, kept):
    velocity = _guided(module, params, keys_values, masks, scale, interval, sequential)
    return velocity if kept is None else keep(velocity, kept)


def _guided(module: nn.Module, params: Any, keys_values, masks, scale, interval, sequential):
    """Returns the guided velocity as a function of latents, timestep and sigma.

    The two halves of an image are neighbours in the batch, [u_0, c_0, u_1, c_1, ...], so that
    splitting the batch over devices never separates them.
    """

    inputs = (scale[:, 0, 0, 0],) if module.config.is_sprint else ()

    def evaluate(x, timestep, keys_values, masks):
        timestep = timestep[None] * module.config.timestep_scale
        given = x, timestep, keys_values, masks, *inputs
        return module.apply({"params": params}, *given, method="denoise")

    def half(x, timestep, i):
        kv = jax.tree.map(lambda kv: kv[..., i, :, :], keys_values)
        return evaluate(x, timestep, kv, masks[:, i])

    def together(x, timestep):
        kv = jax.tree.map(lambda kv: rearrange(kv, "... b s l c -> ... (b s) l c"), keys_values)
        x = repeat(x, "b ... -> (b s) ...", s=2)
        out = evaluate(x, timestep, kv, rearrange(masks, "b s l -> (b s) l"))
        return tuple(rearrange(out, "(b s) ... -> s b ...", s=2))

    def in_turn(x, timestep):
        return tuple(lax.map(lambda i: half(x, timestep, i), jnp.arange(2)))

    if masks.shape[1] == 1:
        return lambda x, timestep, sigma: half(x, timestep, 0)
    conditional = partial(half, i=1)
    return guide(in_turn if sequential else together, conditional, scale, interval)
