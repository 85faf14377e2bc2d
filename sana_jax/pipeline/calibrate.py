"""Measures the rows of a transformer's products while it draws, for int8 rows of fixed ranges."""

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array

from sana_jax.checkpoints.components import Checkpoint
from sana_jax.checkpoints.load import place_all
from sana_jax.kernels.int8 import Watched
from sana_jax.pipeline.pipeline import SanaPipeline
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.progress import Progress
from sana_jax.sharding import make_mesh


class Ranges:
    """The largest numbers that layers told of: (layers, C) by name."""

    def __init__(self) -> None:
        self._found: dict[str, dict[int, np.ndarray]] = {}
        self._lock = threading.Lock()

    def tell(self, name: str, layer: Array, largest: Array) -> None:
        """Takes the channels' largest numbers; NaN stays."""
        with self._lock:
            of_layers, number = self._found.setdefault(name, {}), int(layer)
            of_layers[number] = np.maximum(of_layers.get(number, 0), np.asarray(largest))

    def found(self) -> dict[str, np.ndarray]:
        """Returns the ranges. Raises UserError, naming the layer, for rows that are not finite."""
        jax.effects_barrier()
        found = {
            name: np.stack([of[number] for number in sorted(of)])
            for name, of in self._found.items()
        }
        for name, ranges in found.items():
            if not np.isfinite(ranges).all():
                raise UserError(f"calibration: the rows of {name} have NaN or infinite values")
        return found


def watched(params: Any, layers: Sequence[str], ranges: Ranges) -> Any:
    """Returns a network's parameters whose `layers` tell of the rows that they see."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for name in layers:
        kernel = flat[f"{name}/kernel"]
        numbers = jnp.arange(len(kernel)) if kernel.ndim == 3 else jnp.zeros((), jnp.int32)
        flat[f"{name}/kernel"] = Watched(kernel, numbers, name, ranges.tell)
    return traverse_util.unflatten_dict(flat, sep="/")


def row_ranges(
    checkpoint: Checkpoint, layers: Sequence[str], calls: Sequence[dict[str, Any]]
) -> dict[str, np.ndarray]:
    """Returns the largest number of every channel of the rows of `layers`, (layers, C).

    `checkpoint` is opened, and not quantised; its weights are read a second time later. Each of
    `calls` has the arguments of a pipeline's call. Raises UserError, before the first is drawn,
    with the number of the call that cannot be.
    """
    dtype = str(jax.tree.leaves(checkpoint.params["dit"])[0].dtype)
    mesh = make_mesh(devices=jax.local_devices()[:1])
    placed = dataclasses.replace(checkpoint, params=dict(checkpoint.params))
    place_all(placed, "calibration", dtype, mesh)
    pipe, ranges = SanaPipeline(placed, mesh, dtype), Ranges()
    for number, arguments in enumerate(calls, 1):
        try:
            pipe.request(**arguments)
        except UserError as error:
            raise UserError(f"prompt {number} of {len(calls)}: {error}") from None
    pipe.params = {**pipe.params, "dit": watched(pipe.params["dit"], layers, ranges)}
    with Progress(len(calls), "prompt", "calibrating") as bar:
        for arguments in calls:
            jax.block_until_ready(pipe(**arguments, output="latent"))
            bar.update()
    return ranges.found()
