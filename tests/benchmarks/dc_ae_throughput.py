"""Measures how fast configs/dc_ae_shapes.py trains here, and if its data loading keeps up.

    python -m tests.benchmarks.dc_ae_throughput [--data_dir=DIR] [--num_steps=20] [--batch_size=8]

The same compiled step runs in alternation on batches whose records are read for the first time
(cold: the first epoch), on batches of records that are kept in memory (warm: later epochs), and on
one fixed batch. The peak is that of this machine's own float32 matrix product, measured in between.
The last line is JSON. Not a test: its figures are in a README.md.
"""

import contextlib
import itertools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from configs import dc_ae_shapes
from sana_jax.data.loader import TrainingLoader
from sana_jax.data.orders import GlobalOrder
from sana_jax.runtime import cli
from sana_jax.shapes.dataset import prepare
from sana_jax.training.autoencoder.run import AutoencoderTraining
from sana_jax.training.loop import jit_step
from sana_jax.training.prefetch import Prefetch
from sana_jax.training.state import on_mesh

DATA_DIR = flags.DEFINE_string("data_dir", "/tmp/sana_jax_shapes", "where shapes is, or goes")
STEPS = flags.DEFINE_integer("num_steps", 20, "steps a round")
ROUNDS = flags.DEFINE_integer("rounds", 3, "rounds of each kind")
BATCH = flags.DEFINE_integer("batch_size", 8, "images a step")


def main(argv: list[str]) -> None:
    del argv
    config = dc_ae_shapes.get_config()
    config.data.data_dir = DATA_DIR.value
    config.phases.low_resolution.batch_size = BATCH.value
    prepare(DATA_DIR.value, 128, *(dict(config.data.shapes.train)[128], 1000, 0))
    training = AutoencoderTraining(config, "/nonexistent")
    task = training.tasks["low_resolution"]
    abstract, create = on_mesh(lambda: task.init(jax.random.key(0)), training.mesh)
    step = jit_step(task.step, abstract, training.perceptual_params)
    state = create()
    # Measure the three kinds of batches in turn.
    cold, warm = training.data.loader(task.phase, 0), _warmed(training.data.loader(task.phase, 0))
    with contextlib.ExitStack() as stack:
        sources = {
            kind: stack.enter_context(Prefetch(iter(loader), training.mesh))
            for kind, loader in (("cold", cold), ("warm", warm))
        }

        def loaded(kind):
            return sources[kind].take(lambda: False, lambda: False).batch

        fixed = loaded("cold")
        flops = _flops(task, abstract, fixed)
        state, metrics = step(state, fixed)
        seconds = {"cold": [], "warm": [], "fixed": []}
        peaks = []
        for kind in [*seconds] * ROUNDS.value:
            jax.block_until_ready(metrics)
            began, previous = time.monotonic(), metrics
            for _ in range(STEPS.value):
                batch = fixed if kind == "fixed" else loaded(kind)
                state, metrics = step(state, batch)
                jax.block_until_ready(previous)  # as the loop does: one step in flight
                previous = metrics
            jax.block_until_ready(metrics)
            seconds[kind].append((time.monotonic() - began) / STEPS.value)
            peaks.append(_peak())
    # Report the medians.
    cold, warm, fixed = (float(np.median(seconds[kind])) for kind in seconds)
    found = {
        "images_per_second": BATCH.value / cold,
        "seconds_cold": cold,
        "seconds_warm": warm,
        "seconds_with_fixed_batch": fixed,
        "ratio_cold": cold / fixed,
        "ratio_warm": warm / fixed,
        "gflop_per_image": flops / BATCH.value / 1e9,
        "matmul_peak_gflops": max(peaks) / 1e9,
        "share_of_peak": flops / cold / max(peaks),
    }
    for name, value in found.items():
        print(f"{name:>26} {value:.4g}")
    print(json.dumps(found))


def _warmed(loader: TrainingLoader) -> TrainingLoader:
    """Returns the loader with only a few batches' records, which it has read already."""
    loader.order = GlobalOrder(4 * loader.batch_size, loader.seed)
    for index in range(loader.order.length):
        loader.source[index]
    return loader


def _flops(task, abstract, batch) -> float:
    """Returns three times the FLOPs of a forward pass, as XLA counts them unoptimised."""

    def forward(params, images):
        return task.model.apply({"params": params}, images)

    lowered = jax.jit(forward).lower(abstract.params["autoencoder"], batch["image"])
    # XLA counts the body of a scan once; here every stage has only one block.
    assert max(itertools.chain(task.model.config.encoder_layers)) == 1
    return 3 * lowered.cost_analysis()["flops"]


def _peak(size: int = 2048) -> float:
    """Returns the FLOP/s of a float32 matrix product."""
    x = jnp.ones((size, size))
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(x, x))
    times = []
    for _ in range(3):
        began = time.monotonic()
        jax.block_until_ready(multiply(x, x))
        times.append(time.monotonic() - began)
    return 2 * size**3 / min(times)


if __name__ == "__main__":
    cli.run(main)
