"""Reads the weights of Inception-v3 that pytorch-fid publishes, under torchvision's names.

    NAME.conv.weight; NAME.bn.weight, .bias, .running_mean, .running_var        every convolution
    NAME.bn.num_batches_tracked, fc.*, AuxLogits.*                              not read

The same file serves clean-fid's and torch-fidelity's figures, whose networks are the same. A batch
norm is folded into its convolution, in float64.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from sana_jax.checkpoints.mapping import CONV, Entry, check
from sana_jax.checkpoints.pth import PthReader
from sana_jax.checkpoints.tensors import TensorReader, Tensors
from sana_jax.models.inception import SIDE, InceptionV3
from sana_jax.runtime.errors import UserError

EPSILON = 1e-3  # of the batch norms
NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}
UNREAD = "num_batches_tracked", "fc.weight", "fc.bias"


def load(path: str | Path) -> Any:
    """Returns the parameters of InceptionV3 in float32, from a .pth or .safetensors file.

    Raises UserError for a file that cannot be read, and for tensors that are missing, of another
    shape or not finite.
    """
    path = Path(path).expanduser()
    reader = PthReader if path.suffix in (".pth", ".pt") else TensorReader
    theirs: Tensors = reader(path)
    shapes = abstract_params()
    entries = [entry for name in shapes for entry in _entries(name)]
    wanted = {entry.path: _shape(shapes[entry.path.rpartition("/")[0]], entry) for entry in entries}
    auxiliary = tuple(name for name in theirs if name.startswith("AuxLogits."))
    check(f"Inception-v3 in {path}", entries, wanted, theirs, UNREAD + auxiliary)
    params = {}
    for name in shapes:
        raw = {e.path.rpartition("/")[2]: e.read(theirs, np.float64) for e in _entries(name)}
        if (raw["variance"] < 0).any():
            raise UserError(f"{path}: {name} has a variance below zero")
        scale = raw["scale"] / np.sqrt(raw["variance"] + EPSILON)
        params[f"{name}/kernel"] = (raw["kernel"] * scale).astype(np.float32)
        params[f"{name}/bias"] = (raw["bias"] - raw["mean"] * scale).astype(np.float32)
    return traverse_util.unflatten_dict(params, sep="/")


def abstract_params() -> dict[str, tuple[int, ...]]:
    """Returns the shape of every convolution's kernel, by the convolution's path."""
    picture = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), np.float32)
    tree = jax.eval_shape(InceptionV3().init, jax.random.key(0), picture)["params"]
    flat = traverse_util.flatten_dict(tree, sep="/")
    return {
        name.removesuffix("/kernel"): leaf.shape
        for name, leaf in flat.items()
        if name.endswith("/kernel")
    }


def _entries(name: str) -> list[Entry]:
    theirs = name.replace("/", ".")
    norm = [Entry(f"{name}/{ours}", (f"{theirs}.bn.{their}",)) for ours, their in NORM.items()]
    return [Entry(f"{name}/kernel", (f"{theirs}.conv.weight",), CONV), *norm]


def _shape(kernel: tuple[int, ...], entry: Entry) -> jax.ShapeDtypeStruct:
    shape = kernel if entry.path.endswith("/kernel") else kernel[-1:]
    return jax.ShapeDtypeStruct(shape, np.float32)
