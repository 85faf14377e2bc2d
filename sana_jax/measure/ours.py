"""Our side of a measurement: SanaPipeline on one device, with random weights of one network."""

import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from sana_jax import SanaPipeline
from sana_jax.checkpoints.components import abstract_params, component_dtype, in_dtype, place
from sana_jax.diffusion import scm
from sana_jax.measure import inputs
from sana_jax.measure.inputs import PARTS, Settings
from sana_jax.models import flops
from sana_jax.pipeline import denoise
from sana_jax.pipeline.steps import Steps
from sana_jax.sharding import make_mesh


def make_pipeline(settings: Settings, mesh: Mesh | None = None) -> SanaPipeline:
    """Returns the preset's pipeline without weights, by default on this host's first device."""
    checkpoint = inputs.checkpoint(settings)
    checkpoint.params = {}
    mesh = mesh or make_mesh(devices=jax.local_devices()[:1])
    pipe = SanaPipeline(checkpoint, mesh, settings.dtype)
    pipe.dit = pipe.dit.clone(implementation=settings.implementation)
    return pipe


class Ours:
    """Runs one part: first `load` its weights, then `run(call)`, which waits for the result."""

    def __init__(self, settings: Settings):
        self.settings, self.device = settings, jax.local_devices()[0]
        self.pipe = make_pipeline(settings)

    def load(self) -> None:
        """Makes the weights of the part's network and puts them on the device."""
        pipe, name = self.pipe, PARTS[self.settings.part]
        weights = inputs.checkpoint(self.settings).params[name]
        dtype = component_dtype(name, self.settings.dtype)
        pipe.params[name] = place(weights, getattr(pipe.checkpoint, name), dtype, pipe.mesh)
        self._run = prepare(pipe, self.settings)

    def run(self, call: int) -> jax.Array:
        """Runs the part on the inputs of this call and waits for the result."""
        return jax.block_until_ready(self._run(call))

    def to_numpy(self, out: jax.Array) -> np.ndarray:
        """Returns the result in float32, for the comparison with the reference."""
        return np.asarray(out, np.float32)

    def describe(self) -> dict[str, Any]:
        """Returns the device, the FLOPs of a call and the bytes of the weights."""
        name = PARTS[self.settings.part]
        config, dtype = getattr(self.pipe.checkpoint, name), self.settings.dtype
        shapes = in_dtype(nn.unbox(abstract_params(config)), component_dtype(name, dtype))
        leaves = jax.tree.leaves(shapes)
        return dict(
            platform=self.device.platform,
            device=self.device.device_kind,
            cores=len(os.sched_getaffinity(0)),
            jax=jax.__version__,
            flops=count(self.pipe, self.settings),
            weight_bytes=sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves),
        )

    def peak_bytes(self) -> int | None:
        """Returns the peak use of the device's memory; None if that is the host's memory."""
        return (self.device.memory_stats() or {}).get("peak_bytes_in_use")

    def peak_flops(self) -> float:
        """Returns the FLOP/s of the fastest of several large square products in the same dtype."""
        side, calls = (2048, 1) if self.device.platform == "cpu" else (8192, 10)
        float32 = self.settings.dtype == "float32"

        @jax.jit
        def product(a, b):
            # Float32 sums in every dtype make narrow products fastest, on a CPU too.
            return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype)

        best = math.inf
        with jax.default_matmul_precision("float32" if float32 else "default"):
            a = jnp.ones((side, side), self.settings.dtype)
            jax.block_until_ready(product(a, a))
            for _ in range(6):
                start = time.perf_counter()
                for _ in range(calls):
                    out = product(a, a)
                jax.block_until_ready(out)
                best = min(best, (time.perf_counter() - start) / calls)
        return 2 * side**3 / best


def prepare(pipe: SanaPipeline, settings: Settings):
    """Returns the part as a function of the call's number, with its inputs on the device."""
    batch, side, dit = settings.batch, settings.size // pipe.factor, pipe.checkpoint.dit
    channels, rows = pipe.latent_channels, pipe.checkpoint.text_rows
    network, halves = (side, channels, rows, dit.caption_channels), inputs.halves(dit)
    if settings.part == "text":
        text = inputs.instruction()
        return lambda call: pipe.encode_prompt(inputs.prompts(batch, call), text)[0]
    if settings.part == "trunk":
        given = jax.tree.map(jnp.asarray, inputs.trunk(halves * batch, *network))
        timestep = jnp.full(halves * batch, inputs.TIMESTEP * dit.timestep_scale)
        latents, captions, mask = given["latents"], given["captions"], given["mask"]
        return lambda call: pipe.velocity(latents, timestep, captions, mask)
    if settings.part == "loop":
        given = jax.tree.map(jnp.asarray, inputs.loop(batch, *network))
        captions = jnp.stack([given["negative"], given["captions"]][-halves:], axis=1)
        masks = jnp.stack([given["negative_mask"], given["mask"]][-halves:], axis=1)
        scale = jnp.full((batch, 1, 1, 1), inputs.GUIDANCE_SCALE)
        schedule = Steps.of(pipe.facts, settings.steps, None, None, None).schedule
        conditions, fresh = (schedule, captions, masks, scale, None), None
        start = given["latents"]
        if dit.is_sprint:
            start = scm.pure_noise(start, schedule.sigma[0])
            fresh = jnp.asarray(inputs.fresh(batch, settings.steps, side, channels))

        def sample(call):
            network = pipe.dit, pipe.params["dit"]
            with pipe.context():
                return denoise.sample(*network, start, *conditions, sequential=False, fresh=fresh)

        return sample
    if settings.part == "decode":
        latents = jnp.asarray(inputs.decode(batch, side, channels))
        return lambda call: pipe.decode(latents)
    images = jnp.asarray(inputs.encode(batch, settings.size))
    return lambda call: pipe.encode(images)


def count(pipe: SanaPipeline, settings: Settings) -> int:
    """Returns the operations of one call, as flops.py counts them, without padding of prompts.

    Results of earlier calls or steps do not count again: the instruction's keys and values, and in
    the loop those of the captions.
    """
    checkpoint, size, batch = pipe.checkpoint, settings.size, settings.batch
    side, rows = size // pipe.factor, checkpoint.text_rows
    if settings.part == "text":
        before, text = inputs.INSTRUCTION_TOKENS, inputs.instruction() + inputs.prompts(1, 0)[0]
        tokens = len(checkpoint.tokenizer.encode(text)) - before
        return batch * flops.text(checkpoint.text_encoder, tokens, before)
    if settings.part in ("trunk", "loop"):
        steps = settings.steps if settings.part == "loop" else 1
        denoise = steps * flops.denoise(checkpoint.dit, side, side, rows)
        halves = inputs.halves(checkpoint.dit)
        return halves * batch * (flops.captions(checkpoint.dit, rows) + denoise)
    count_one = {"decode": flops.decode, "encode": flops.encode}[settings.part]
    return batch * count_one(checkpoint.vae, size, size)
