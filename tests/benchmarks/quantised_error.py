"""What int8 costs: the velocity's error by layer, the pictures' PSNR, and the time on this CPU.

    python -m tests.benchmarks.quantised_error layers [PRESET]    one block of full width
    python -m tests.benchmarks.quantised_error times [PRESET]     two blocks, interleaved
    python -m tests.benchmarks.quantised_error pictures [COUNT]   the bundled model, against float32

Weights of `layers` and `times` are random, so their errors are not those of a trained network; they
tell the layers apart. Not part of the suite: it takes minutes.
"""

import dataclasses
import os
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402

from sana_jax import SanaPipeline  # noqa: E402
from sana_jax.checkpoints import random_weights  # noqa: E402
from sana_jax.checkpoints.components import Checkpoint, module_for, place  # noqa: E402
from sana_jax.checkpoints.load import open_checkpoint, place_all  # noqa: E402
from sana_jax.checkpoints.quantised import quantise  # noqa: E402
from sana_jax.quantisation.table import METHODS  # noqa: E402
from sana_jax.shapes.captions import prompts  # noqa: E402
from sana_jax.sharding import make_mesh  # noqa: E402
from tests.toy import relative_error  # noqa: E402

NONE = (".*", "none")
REPEAT = 5


def network(preset: str, depth: int) -> Checkpoint:
    """The transformer of a preset, of full width and `depth` blocks, beside an autoencoder."""
    made, configs = random_weights.configs(preset), random_weights.configs
    try:
        random_weights.configs = lambda _: (dataclasses.replace(made[0], depth=depth), *made[1:])
        whole = random_weights.make(preset, distinct=10_000_019)
    finally:
        random_weights.configs = configs
    return dataclasses.replace(whole, text_encoder=None, tokenizer=None)


def inputs(config, batch: int, side: int):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((batch, side, side, config.latent_channels), np.float32)
    caption = rng.standard_normal((batch, 300, config.caption_channels), np.float32)
    mask = np.arange(300)[None] < np.full((batch, 1), 30)
    return latents, np.full(batch, 749.0, np.float32), caption, mask


def program(checkpoint: Checkpoint, dtype: str, batch: int, side: int):
    """A function without arguments that evaluates the network."""
    config = checkpoint.dit
    params = place(checkpoint.params["dit"], config, dtype, make_mesh())
    apply = jax.jit(module_for(config, dtype).apply)
    given = inputs(config, batch, side)
    return lambda: np.asarray(apply({"params": params}, *given))


def layers(preset: str = "sana_1600m_1024") -> None:
    base = network(preset, depth=1)
    exact = program(base, "float32", 1, 16)()
    layers = [name for name, _ in quantise(base, "w8").dit.quantised]
    tried = [("w8", None), ("w8a8", None)]
    tried += [("w8a8", name) for name in (*layers, "blocks/cross_attention/kv")]
    for method, layer in tried:
        changes = [(f"dit/{layer}", method), NONE] if layer else []
        made = quantise(base, method, changes)
        error = relative_error(program(made, "float32", 1, 16)(), exact)
        print(f"{preset} {method:5} {layer or 'all of the table':28} {error:.2e}", flush=True)
    error = relative_error(program(base, "bfloat16", 1, 16)(), exact)
    print(f"{preset} bfloat16 without int8 {error:.2e}", flush=True)


def times(preset: str = "sana_1600m_1024") -> None:
    base = network(preset, depth=2)
    sides = {
        method: program(quantise(base, method) if method else base, "bfloat16", 2, 16)
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


def pictures(count: str = "32") -> None:
    texts = [each.text for each in prompts(int(count), 0)]
    drawn = {}
    for method in (None, *METHODS):
        checkpoint, mesh = open_checkpoint("shapes"), make_mesh()
        checkpoint = checkpoint if method is None else quantise(checkpoint, method)
        place_all(checkpoint, "shapes", "float32", mesh)
        pipe = SanaPipeline(checkpoint, mesh, "float32")
        drawn[method] = np.concatenate(
            [
                pipe(texts[i : i + 16], seed=[*range(i, i + 16)], guidance_scale=2.0, output="np")
                for i in range(0, len(texts), 16)
            ]
        ).astype(np.float64)
    for method in METHODS:
        errors = ((drawn[method] - drawn[None]) ** 2).mean((1, 2, 3))
        psnr = 10 * np.log10(255**2 / np.maximum(errors, 1e-3))
        shown = np.percentile(psnr, [0, 10, 50])
        print(
            f"{method}: PSNR to float32 {psnr.mean():.1f} dB, mean of {len(psnr)} pictures; least,"
            f" tenth and half: {', '.join(f'{x:.1f}' for x in shown)}; below 30 dB:"
            f" {int((psnr < 30).sum())}"
        )


if __name__ == "__main__":
    {f.__name__: f for f in (layers, times, pictures)}[sys.argv[1]](*sys.argv[2:])
