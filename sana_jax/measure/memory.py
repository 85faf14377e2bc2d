"""The compiler's account of the memory that drawing needs. Nothing runs, no weight exists.

The compiler is that of the mesh's platform. Of pictures that are decoded in tiles one tile counts,
without the picture that it is a part of. At its peak the device holds the weights of all networks
and, of the part that needs most, inputs, outputs and what the compiler calls temporary.
"""

import contextlib
import math

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sana_jax.checkpoints.components import component_dtype, param_shapes
from sana_jax.measure import inputs
from sana_jax.measure.inputs import PARTS, Settings
from sana_jax.measure.ours import make_pipeline


def analyse(settings: Settings, mesh: Mesh | None = None) -> dict:
    """Bytes: `weights` a network, `working` a part, and the peaks of all, with and without Gemma.

    `mesh`: one device, which need not be there; None: this host's first.

    `peak`: all three networks on the device. `peak_without_text_encoder`: it was dropped, or moved
    to the host, when the prompts were encoded.
    """
    pipe = make_pipeline(settings, mesh)
    params = {
        name: _abstract(name, pipe, settings.dtype) for name in ("text_encoder", "dit", "vae")
    }
    weights = {name: _bytes(tree) for name, tree in params.items()}
    working = {}
    for part in ("text", "loop", "decode"):
        name = PARTS[part]
        compiled = _compile(pipe, part, params[name], settings)
        found = compiled.memory_analysis()
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


def _abstract(name: str, pipe, dtype: str):
    shapes, dtype = param_shapes(getattr(pipe.checkpoint, name)), component_dtype(name, dtype)
    where = NamedSharding(pipe.mesh, P())
    flat = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=where)
        for path, leaf in shapes.items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def _bytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _compile(pipe, part: str, params, settings: Settings):
    """The part's program, through the pipeline's own methods, whose weights are arguments."""
    batch, side = settings.batch, settings.size // pipe.factor
    latents = jax.ShapeDtypeStruct((batch, side, side, pipe.latent_channels), jnp.float32)
    rows, width = pipe.checkpoint.text_rows, pipe.checkpoint.dit.caption_channels
    captions = jax.ShapeDtypeStruct((batch, rows, width), jnp.float32)
    mask = jax.ShapeDtypeStruct((batch, rows), bool)
    size = dict(height=settings.size, width=settings.size, output="latent")

    def text(params):
        pipe.params = {"text_encoder": params}
        return pipe.encode_prompt(inputs.prompts(batch, 0), inputs.instruction())

    def loop(params, latents, captions, mask):
        pipe.params = {"dit": params}
        pipe.encode_prompt = lambda prompts, instruction="auto": (captions, mask)
        return pipe(["x"] * batch, negative_prompt=[""] * batch, latents=latents, **size)

    if part == "decode" and (tile := pipe._tile("auto", settings.size, settings.size)):
        side = tile[0] // pipe.factor
        latents = jax.ShapeDtypeStruct((batch, side, side, pipe.latent_channels), jnp.float32)

    def decode(params, latents):
        pipe.params = {"vae": params}
        return pipe.decode(latents)

    function, arguments = {
        "text": (text, ()),
        "loop": (loop, (latents, captions, mask)),
        "decode": (decode, (latents,)),
    }[part]
    # The mesh is entered out here: a function that is being traced cannot.
    enter, pipe._context = type(pipe)._context, contextlib.nullcontext
    with enter(pipe):
        # Also what the part does not read, such as the encoder's weights in decoding.
        return jax.jit(function, keep_unused=True).lower(params, *arguments).compile()
