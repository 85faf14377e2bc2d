"""A training command like sana_jax.train, of a network of eight numbers: it compiles in no time."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sana_jax import sharding
from sana_jax.runtime import cli, hosts
from sana_jax.runtime.files import replace_folder, storage
from sana_jax.training.checkpoints.manager import Checkpoints
from sana_jax.training.command import training_command
from sana_jax.training.loop import LoopConfig
from sana_jax.training.session import Session, computing
from sana_jax.training.state import advance, new_state, on_mesh

ROWS = 8


class Batches:
    """This process's rows of each batch, which its number decides."""

    def __init__(self):
        self.number = 0

    def __iter__(self):
        return self

    def __next__(self):
        batch = np.random.default_rng(self.number).standard_normal((ROWS, 8), np.float32)
        self.number += 1
        share = ROWS // jax.process_count()
        return {"x": batch[jax.process_index() * share :][:share]}

    def get_state(self):
        return self.number

    def set_state(self, state):
        self.number = state


def init():
    params = {"w": jnp.zeros(8)}
    return new_state(params, {"total": jnp.zeros(8)}, jax.random.key(0))


def step(s, batch):
    noise = jax.random.normal(s.step_key(), (8,))
    gradient = s.params["w"] - (batch["x"].mean(0) + 0.1 * noise)
    total = 0.9 * s.opt_state["total"] + gradient
    params = {"w": s.params["w"] - 0.1 * total}
    ema = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, s.ema, params)
    good = jnp.isfinite(gradient).all()
    s = advance(s, good, params=params, opt_state={"total": total}, ema=ema)
    return s, {"loss": jnp.square(gradient).mean()}


class Training:
    def __init__(self, config, workdir):
        self.config, self.workdir = config, workdir

    def run(self):
        config, mesh = self.config.to_dict(), sharding.make_mesh(devices=jax.devices())
        folder = Path(self.workdir) / "model"

        def write(numbers):
            with storage(folder), replace_folder(folder) as part:
                np.save(part / "numbers.npy", numbers)

        with (
            computing(mesh, "float32"),
            Checkpoints(self.workdir, config, {"seed": 0}) as checkpoints,
        ):
            abstract, create = on_mesh(init, mesh)
            session = Session(checkpoints, Batches(), mesh, LoopConfig(**config["loop"]))
            state = session.fit(session.begin(abstract, create), [step])
            hosts.on_first_host(write, hosts.gather_arrays(state.ema)["w"])
        hosts.on_first_host(partial(print, folder, flush=True))


main = training_command(Training)

if __name__ == "__main__":
    cli.run(main, resumes=True)
