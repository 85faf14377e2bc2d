"""What int8 costs: the velocity's error by layer, the pictures' PSNR, and the time on this CPU.

    python -m tests.benchmarks.quantised_error layers [PRESET]    one block of full width, or shapes
    python -m tests.benchmarks.quantised_error times [PRESET]     two blocks, interleaved
    python -m tests.benchmarks.quantised_error pictures COUNT REFERENCE WAY...

A preset's weights are random, so that its errors are not those of a trained network; they tell the
layers apart. `layers shapes` is the bundled model on noisy latents of held-out pictures.

`pictures` compares models of `shapes` with REFERENCE in float32: PSNR of pictures of the same seed,
and of the transformer alone, on the same latents and text, the velocity's error and the loss. A WAY
is CHECKPOINT, or CHECKPOINT= and: a method of convert --quantise, after which rules of
--quantise_layer may follow (shapes=w8a8,vae/.*=none); a dtype; or a number, by which every weight
of the transformer is changed: times 1 + the number times a normal one. Not part of the suite: it
takes minutes.
"""

import dataclasses
import os
import statistics
import sys
import time
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402

from sana_jax import SanaPipeline  # noqa: E402
from sana_jax.checkpoints import random_weights  # noqa: E402
from sana_jax.checkpoints.components import Checkpoint, module_for, place  # noqa: E402
from sana_jax.checkpoints.load import open_checkpoint, place_all  # noqa: E402
from sana_jax.checkpoints.quantised import quantise  # noqa: E402
from sana_jax.diffusion.flow import NUM_TIMESTEPS  # noqa: E402
from sana_jax.models.dit import PRESETS  # noqa: E402
from sana_jax.pictures import to_float  # noqa: E402
from sana_jax.pipeline.request import DTYPES  # noqa: E402
from sana_jax.quantisation.table import METHODS  # noqa: E402
from sana_jax.shapes.captions import prompts  # noqa: E402
from sana_jax.shapes.draw import draw  # noqa: E402
from sana_jax.shapes.evaluation import GUIDANCE_SCALE  # noqa: E402
from sana_jax.sharding import make_mesh  # noqa: E402
from tests.toy import relative_error  # noqa: E402

NONE = (".*", "none")
REPEAT = 5
SIGMAS = 0.1, 0.3, 0.5, 0.7, 0.9
BATCH = 16


def network(preset: str, depth: int) -> Checkpoint:
    """The transformer of a preset, of full width and `depth` blocks, beside an autoencoder."""
    made, configs = random_weights.configs(preset), random_weights.configs
    try:
        random_weights.configs = lambda _: (dataclasses.replace(made[0], depth=depth), *made[1:])
        whole = random_weights.make(preset, distinct=10_000_019)
    finally:
        random_weights.configs = configs
    return dataclasses.replace(whole, text_encoder=None, tokenizer=None)


class Inputs(NamedTuple):
    """What the network reads, a row for each evaluation."""

    latents: np.ndarray
    timestep: np.ndarray
    captions: np.ndarray
    mask: np.ndarray


def random_inputs(config, batch: int, side: int) -> Inputs:
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((batch, side, side, config.latent_channels), np.float32)
    caption = rng.standard_normal((batch, 300, config.caption_channels), np.float32)
    mask = np.arange(300)[None] < np.full((batch, 1), 30)
    return Inputs(latents, np.full(batch, 749.0, np.float32), caption, mask)


def held_out(pipe: SanaPipeline, count: int) -> tuple[Inputs, np.ndarray]:
    """Returns noisy latents of held-out pictures at all SIGMAS, and the velocity to predict."""
    asked = prompts(count, 0)
    size, groups = pipe.native_size, range(0, count, BATCH)
    pictures = np.stack([draw(each.scene, size, size) for each in asked])
    parts = [pipe.encode(np.asarray(to_float(pictures[i : i + BATCH]))) for i in groups]
    latents = np.concatenate([np.asarray(part) for part in parts])
    texts = [pipe.encode_prompt([x.text for x in asked[i : i + BATCH]]) for i in groups]
    captions, mask = (np.concatenate([*map(np.asarray, x)]) for x in zip(*texts, strict=True))
    noise = np.random.default_rng(0).standard_normal(latents.shape, np.float32)
    noisy = np.concatenate([(1 - sigma) * latents + sigma * noise for sigma in SIGMAS])
    timestep = np.repeat(np.float32(SIGMAS) * NUM_TIMESTEPS, count)
    captions, mask, target = (
        np.concatenate([x] * len(SIGMAS)) for x in (captions, mask, noise - latents)
    )
    return Inputs(noisy.astype(np.float32), timestep, captions, mask), target


def program(checkpoint: Checkpoint, dtype: str, given: Inputs):
    """A function without arguments that evaluates the network."""
    config = checkpoint.dit
    params = place(checkpoint.params["dit"], config, dtype, make_mesh())
    apply = jax.jit(module_for(config, dtype).apply)
    return lambda: np.asarray(apply({"params": params}, *given))


def layers(preset: str = "sana_1600m_1024") -> None:
    if preset in PRESETS:
        base = network(preset, depth=1)
        given = random_inputs(base.dit, 1, 16)
    else:
        given, _ = held_out(opened(preset), 64)
        base = open_checkpoint(preset)
    exact = program(base, "float32", given)()
    layers = [name for name, _ in quantise(base, "w8").dit.quantised]
    tried = [("w8", None), ("w8a8", None)]
    tried += [("w8a8", name) for name in (*layers, "blocks/cross_attention/kv")]
    for method, layer in tried:
        changes = [(f"dit/{layer}", method), NONE] if layer else []
        made = quantise(base, method, changes)
        error = relative_error(program(made, "float32", given)(), exact)
        print(f"{preset} {method:5} {layer or 'all of the table':28} {error:.2e}", flush=True)
    error = relative_error(program(base, "bfloat16", given)(), exact)
    print(f"{preset} bfloat16 without int8 {error:.2e}", flush=True)


def times(preset: str = "sana_1600m_1024") -> None:
    base = network(preset, depth=2)
    given = random_inputs(base.dit, 2, 16)
    sides = {
        method: program(quantise(base, method) if method else base, "bfloat16", given)
        for method in (None, *METHODS)
    }
    for run in sides.values():
        run()
    seconds = {name: [] for name in sides}
    for _ in range(REPEAT):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    first = statistics.median(seconds[None])
    for name, found in seconds.items():
        shown = f"{statistics.median(found) / first:.2f} of bfloat16's time"
        print(f"{preset} {name or 'bfloat16'}: {shown}", flush=True)


def opened(way: str) -> SanaPipeline:
    """Returns the pipeline of a WAY; see the head of this file."""
    name, _, how = way.partition("=")
    checkpoint, mesh = open_checkpoint(name), make_mesh()
    method, *changes = how.split(",")
    if method in METHODS:
        checkpoint = quantise(checkpoint, method, [tuple(x.rsplit("=", 1)) for x in changes])
    dtype = method if method in DTYPES else "float32"
    place_all(checkpoint, name, dtype, mesh)
    if how and method not in (*METHODS, *DTYPES):
        checkpoint.params["dit"] = shaken(checkpoint.params["dit"], float(how))
    return SanaPipeline(checkpoint, mesh, dtype)


def shaken(params, deviation: float):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    made = [x * (1 + deviation * jax.random.normal(key, x.shape)) for x, key in pairs]
    return jax.tree.unflatten(tree, made)


def pictures(count: str, reference: str, *ways: str) -> None:
    count = int(count)
    texts = [each.text for each in prompts(count, 0)]

    def evaluated(pipe):
        drawn = [
            pipe(
                texts[i : i + BATCH],
                seed=[*range(i, min(i + BATCH, count))],
                guidance_scale=GUIDANCE_SCALE,
                output="np",
            )
            for i in range(0, count, BATCH)
        ]
        return np.concatenate(drawn).astype(np.float64), np.asarray(pipe.velocity(*given))

    pipe = opened(reference)
    given, target = held_out(pipe, count)
    exact, velocity = evaluated(pipe)
    print(f"{reference}: loss {((velocity - target) ** 2).mean():.6f}", flush=True)
    for way in ways:
        drawn, found = evaluated(opened(way))
        errors = ((drawn - exact) ** 2).mean((1, 2, 3))
        psnr = 10 * np.log10(255**2 / np.maximum(errors, 1e-3))
        least, tenth, half = np.percentile(psnr, [0, 10, 50])
        low = {int(i): round(float(psnr[i]), 1) for i in np.flatnonzero(psnr < 30)}
        print(
            f"{way}: PSNR of {count} mean {psnr.mean():.1f} half {half:.1f} tenth {tenth:.1f}"
            f" least {least:.1f} below 30 {len(low)} {low};"
            f" velocity {relative_error(found, velocity):.2e}"
            f" loss {((found - target) ** 2).mean():.6f}",
            flush=True,
        )


if __name__ == "__main__":
    {f.__name__: f for f in (layers, times, pictures)}[sys.argv[1]](*sys.argv[2:])
