"""A training of four numbers in this process: its batches, its step, and `fit` on both."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from sana_jax import sharding
from sana_jax.training import state
from sana_jax.training.checkpoints.manager import Checkpoints
from sana_jax.training.loop import fit, jit_step
from sana_jax.training.metrics_writer import MetricsWriter


class Batches:
    """Rows whose mean is the number of the batch; those in `nan_at` hold a NaN."""

    def __init__(self, nan_at=(), rows=8, before=lambda number: None, count=10**6):
        self.number, self.nan_at, self.rows = 0, nan_at, rows
        self.before, self.count = before, count

    def __iter__(self):
        return self

    def __next__(self):
        number, self.number = self.number, self.number + 1
        self.before(number)
        if number >= self.count:
            raise StopIteration
        x = np.full((self.rows, 4), number, np.float32)
        if number in self.nan_at:
            x[-1, -1] = np.nan
        return {"x": x}

    def get_state(self):
        return self.number


def init():
    params = {"w": jnp.zeros(4)}
    return state.new_state(params, {"total": jnp.zeros(4)}, jax.random.key(0))


def step(s, batch):
    """Adds the batch's mean to the parameters."""
    mean = batch["x"].mean(0)
    total = s.opt_state["total"] + mean
    s = state.advance(
        s, jnp.isfinite(mean).all(), params={"w": s.params["w"] + mean}, opt_state={"total": total}
    )
    return s, {"loss": mean.mean(), "half": mean.mean() / 2}


def run(workdir, batches, config, **hooks):
    mesh = sharding.make_mesh(fsdp=2)
    abstract, create = state.on_mesh(init, mesh)
    with Checkpoints(workdir, {}, {}, keep=99) as checkpoints:
        begun = create()
        with MetricsWriter(workdir, 0, config.steps) as writer:
            done = fit(
                jit_step(step, abstract), begun, batches, mesh, config, checkpoints, writer, **hooks
            )
        return done, checkpoints


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
