"""A transformer whose timesteps run over 0 .. 1, made of one whose timesteps run over 0 .. 1000.

On the scale 0 .. 1000 the fastest of the embedding's frequencies turns 160 times between data and
noise, so that a network's derivative in time is full of spikes, most of all at the ends, which
training seldom sees. Consistency distillation follows that derivative (SANA-Sprint, arXiv
2503.09641, section 3.2). The embedder is a function of one number, so it can be fitted to itself on
the other scale in seconds; only what no smooth function gives is lost.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from sana_jax.diffusion.flow import NUM_TIMESTEPS
from sana_jax.models.dit import SanaConfig
from sana_jax.models.embedders import TimestepEmbedder

STEPS, RATE, POINTS = 4000, 3e-3, 512
EDGE = 0.02  # of the times, at either end, where the network is not asked: it was seldom trained
FITTED = "linear_1", "linear_2"


def densify(
    config: SanaConfig, params: Any, guidance: float = 0.0
) -> tuple[SanaConfig, Any, float]:
    """Returns config and parameters on the scale 0 .. 1, and the fit's relative error.

    The error is of the modulation and of the embedding, root mean square over their own spread.

    Args:
      config, params: a network with timesteps over 0 .. 1000; its other weights stay unread.
      guidance: the scale that is embedded while Sprint's network is fitted.
    """
    embedder, inputs = TimestepEmbedder(config.width), ()
    if config.is_sprint:
        inputs = (jnp.full(1, guidance * config.guidance_embedding, jnp.float32),)
    old = jax.tree.map(np.float32, params["time_embed"])

    def outputs(weights: Any, time: Float[Array, " B"]) -> Float[Array, "B D"]:
        embedding, modulation = embedder.apply({"params": weights}, time, *inputs)
        return jnp.concatenate([embedding, modulation.reshape(len(time), -1)], -1)

    times = jnp.linspace(EDGE, 1 - EDGE, POINTS)
    target = jax.jit(outputs)(old, NUM_TIMESTEPS * config.timestep_scale * times)
    spread = target.std(0).mean()

    def error(fitted: Any) -> Float[Array, ""]:
        found = outputs({**old, **fitted}, times)
        return jnp.mean((found - target) ** 2) / spread**2

    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))
    fitted = {name: old[name] for name in FITTED}

    @jax.jit
    def fit(fitted):
        def step(carry, _):
            fitted, state = carry
            updates, state = optimizer.update(jax.grad(error)(fitted), state)
            return (optax.apply_updates(fitted, updates), state), ()

        return jax.lax.scan(step, (fitted, optimizer.init(fitted)), None, STEPS)[0][0]

    fitted = fit(fitted)
    given = params["time_embed"]
    found = {name: _like(given[name], fitted[name]) for name in FITTED}
    config = dataclasses.replace(config, timestep_scale=1 / NUM_TIMESTEPS)
    params = {**params, "time_embed": {**given, **found}}
    return config, params, float(jnp.sqrt(error(fitted)))


def _like(given: Any, fitted: Any) -> Any:
    """Returns the fitted weights on the host, in the dtypes that were given."""
    return jax.tree.map(lambda old, new: np.asarray(new, old.dtype), given, fitted)
