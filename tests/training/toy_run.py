"""A training of a tiny model as a command: python -m tests.training.toy_run WORKDIR key=value ...

Keys are those of SETTINGS, each given as JSON. The last line it prints is a hash of the state and
of the next batch. With `kill_at` it kills itself with SIGKILL when that batch is read.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

SETTINGS = {
    "steps": 20,
    "width": 32,
    "seed": 0,
    "checkpoint_every": 5,
    "log_every": 5,
    "max_streak": 4,
    "nan_at": [],  # batches that hold a NaN
    "kill_at": None,
    "terminate_at": None,  # the run sends itself SIGTERM at this batch
    "hang_at": None,
    "sleep": 0.0,  # seconds for each batch
    "watchdog_seconds": 0.0,
    "learning_rate": 1e-2,
    "fsdp": 1,
    "limit_at": None,  # from this batch on no file can grow beyond 20 kB, as on a full disk
    "host": None,  # [index, count, port] of one among several processes
}


class Batches:
    """Rows from grain, with accidents at given batches."""

    def __init__(self, settings):
        import grain
        import jax
        import numpy as np

        def row(seed):
            return np.random.default_rng([settings["seed"], seed]).normal(size=8).astype("float32")

        rows = grain.MapDataset.range(64).seed(1).shuffle().repeat()
        rows = rows.slice(slice(jax.process_index(), None, jax.process_count()))
        self._rows = iter(rows.map(row).batch(8 // jax.process_count()).to_iter_dataset())
        self._settings, self._number = settings, 0

    def __iter__(self):
        return self

    def __next__(self):
        import resource
        import time

        number, settings = self._number, self._settings
        self._number += 1
        time.sleep(settings["sleep"])
        if number == settings["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == settings["terminate_at"]:
            os.kill(os.getpid(), signal.SIGTERM)
        if number == settings["hang_at"]:
            time.sleep(1000)
        if number == settings["limit_at"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        x = next(self._rows)
        if number in settings["nan_at"]:
            x[3, 3] = float("nan")
        return {"x": x}

    def get_state(self):
        return {"number": self._number, "rows": self._rows.get_state()}

    def set_state(self, state):
        self._number = state["number"]
        self._rows.set_state(state["rows"])


def state_hash(state, checkpoints, settings) -> str:
    """Returns a hash of every leaf of the state, and of the next batch."""
    import jax
    import numpy as np

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.replace(key=None)):
        digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    digest.update(np.asarray(jax.random.key_data(state.key)).tobytes())
    batches = Batches(SETTINGS | {"seed": settings["seed"]})
    document = checkpoints.folder / str(int(state.step)) / "run" / "metadata"
    position = json.loads(document.read_text())["iterators"][jax.process_index()]
    batches.set_state(position["json"])
    digest.update(next(batches)["x"].tobytes())
    return digest.hexdigest()


def model(settings, mesh):
    """Returns (abstract state, function that makes the state, step) of a two-layer network."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen as nn

    from sana_jax.training import microbatches, state
    from sana_jax.training.optimizers import optimizers

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
            x = nn.relu(nn.Dense(settings["width"], kernel_init=kernel)(x))
            return nn.Dense(8)(x)

    net = Net()
    config = optimizers.OptimizerConfig(
        learning_rate=settings["learning_rate"], weight_decay=0.1, clip_norm=1.0, warmup_steps=3
    )

    def params():
        return net.init(jax.random.key(settings["seed"]), jnp.zeros((1, 8)))["params"]

    tx, _ = optimizers.make_optimizer(config, jax.eval_shape(params), settings["steps"] + 10)

    def init():
        p = params()
        return state.new_state(p, tx.init(p), jax.random.key(7))

    def step(s, batch):
        noise = jax.random.normal(s.step_key(), batch["x"].shape)

        def loss(p, batch):
            x, noise = batch
            return jnp.square(net.apply({"params": p}, x + 0.1 * noise) - x).mean(), ()

        (value, _), grads = microbatches.accumulated_gradients(
            loss, s.params, (batch["x"], noise), 2
        )
        norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, s.opt_state, s.params)
        new = optax.apply_updates(s.params, updates)
        ema = state.update_ema(s.ema, new, 0.99, s.step)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        s = state.advance(s, finite, params=new, opt_state=opt_state, ema=ema)
        return s, {"loss": value, "gradient_norm": norm}

    return *state.on_mesh(init, mesh), step


def main(argv):
    import jax

    from sana_jax import sharding
    from sana_jax.training.checkpoints.manager import Checkpoints
    from sana_jax.training.loop import LoopConfig, fit, jit_step
    from sana_jax.training.metrics_writer import MetricsWriter

    workdir = Path(argv[1])
    settings = SETTINGS | {k: json.loads(v) for k, v in (a.split("=", 1) for a in argv[2:])}
    names = "steps log_every checkpoint_every max_streak watchdog_seconds".split()
    loop = LoopConfig(**{name: settings[name] for name in names})
    config = {name: settings[name] for name in [*names, "width", "learning_rate"]}
    if settings["host"] and not jax.distributed.is_initialized():
        index, count, port = settings["host"]
        jax.distributed.initialize(f"localhost:{port}", count, index)
    mesh = sharding.make_mesh(fsdp=settings["fsdp"], devices=jax.devices())
    batches = Batches(settings)
    with Checkpoints(workdir, config, {"seed": settings["seed"]}, keep=3) as checkpoints:
        abstract, create, step = model(settings, mesh)
        state = checkpoints.restore(abstract, batches) or create()
        with MetricsWriter(workdir, int(state.step), loop.steps) as writer:
            state = fit(jit_step(step, abstract), state, batches, mesh, loop, checkpoints, writer)
    print(state_hash(state, checkpoints, settings), flush=True)


if __name__ == "__main__":
    from sana_jax.runtime import cli

    arguments, sys.argv = sys.argv, sys.argv[:1]
    cli.run(lambda _: main(arguments))
