"""The memory that drawing needs, as the compiler counts it. Nothing runs, and no weight exists.

The compiler is that of the mesh's platform. For pictures that are decoded in tiles, one tile
counts, without the whole picture. At its peak the device holds the weights of all networks, and the
inputs, outputs and temporary arrays of the part that needs most.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sana_jax.checkpoints.components import abstract_placed, component_dtype
from sana_jax.measure import inputs
from sana_jax.measure.inputs import PARTS, Settings
from sana_jax.measure.ours import make_pipeline
from sana_jax.pipeline import denoise, programs
from sana_jax.pipeline.pipeline import SanaPipeline
from sana_jax.pipeline.request import tiles
from sana_jax.pipeline.steps import Steps
from sana_jax.sharding import batch_divisor
from sana_jax.text.prompts import tokenize


def analyse(settings: Settings, mesh: Mesh | None = None) -> dict:
    """Returns bytes: `weights` of each network, `working` memory of each part, and two peaks.

    `peak` has all three networks on the device. For `peak_without_text_encoder`, the text encoder
    was dropped, or moved to the host, after it encoded the prompts. `mesh` has one device, which
    need not exist; None is this host's first device.
    """
    pipe = make_pipeline(settings, mesh)
    params = {name: abstract_weights(name, pipe, settings.dtype) for name in PARTS.values()}
    weights = {name: _bytes(tree) for name, tree in params.items()}
    working = {}
    # A part's memory beside the weights of its network.
    for part in ("text", "loop", "decode"):
        name = PARTS[part]
        function, arguments = program(pipe, part, params[name], settings)
        with pipe.context():
            # Keeps unread arguments too, such as the encoder's weights in decoding.
            lowered = jax.jit(function, keep_unused=True).lower(*arguments)
            found = lowered.compile().memory_analysis()
        taken = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
        working[part] = taken - found.alias_size_in_bytes - weights[name]
    drawing = max(working["loop"], working["decode"])
    without = weights["dit"] + weights["vae"]
    return dict(
        dtype=settings.dtype,
        platform=pipe.mesh.devices.flat[0].platform,
        weights=weights,
        working=working,
        peak=without + weights["text_encoder"] + max(drawing, working["text"]),
        peak_without_text_encoder=without + drawing,
    )


def abstract_weights(name: str, pipe: SanaPipeline, dtype: str) -> Any:
    """Returns the shapes of a network's weights, with shardings, as the pipeline places them."""
    config = getattr(pipe.checkpoint, name)
    return abstract_placed(config, component_dtype(name, dtype), pipe.mesh)


def _bytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def program(
    pipe: SanaPipeline, part: str, params: Any, settings: Settings
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns a part's program as the pipeline runs it, and its arguments, `params` the first.

    It is to be compiled in `pipe.context()`. `part` is "text", with an instruction as long as the
    published one, "loop" or "decode".
    """
    batch, side = settings.batch, settings.size // pipe.factor
    network = getattr(pipe, PARTS[part])
    if part == "decode" and (tile := tiles(pipe.factor, "auto", settings.size, settings.size)):
        side = tile[0] // pipe.factor
    latents = jax.ShapeDtypeStruct((batch, side, side, pipe.latent_channels), jnp.float32)
    rows, width = pipe.checkpoint.text_rows, pipe.checkpoint.dit.caption_channels
    captions = jax.ShapeDtypeStruct((batch, rows, width), jnp.float32)
    mask = jax.ShapeDtypeStruct((batch, rows), bool)

    def read(params):
        given = tokenize(
            pipe.checkpoint.tokenizer, inputs.prompts(batch, 0), rows, inputs.instruction()
        )
        prefix = programs.read_prefix(network, params, np.array([given.prefix], np.int32))
        found = programs.encode_text(
            network, params, given.tokens, prefix, given.window, given.mask
        )
        return found, given.mask

    def loop(params, latents, captions, mask):
        halves = inputs.halves(network.config)
        both = [jnp.stack([x] * halves, axis=1) for x in (captions, mask)]
        schedule = Steps.of(pipe.facts, settings.steps, None, None, None).schedule
        scale = np.full((batch, 1, 1, 1), inputs.GUIDANCE_SCALE, np.float32)
        conditions, fresh = (schedule, *both, scale, None), None
        if network.config.is_sprint:
            fresh = jnp.repeat(latents[:, None], len(schedule.sigma), axis=1)
        return denoise.sample(network, params, latents, *conditions, sequential=False, fresh=fresh)

    decode = partial(programs.decode_latents, network, devices=batch_divisor(pipe.mesh))
    function, arguments = {
        "text": (read, ()),
        "loop": (loop, (latents, captions, mask)),
        "decode": (decode, (latents,)),
    }[part]
    return function, (params, *arguments)
