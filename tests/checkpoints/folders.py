"""Loads, compares and spoils checkpoint folders."""

import json

import numpy as np
from flax import traverse_util
from safetensors.torch import load_file, save_file

from sana_jax.checkpoints.load import load
from sana_jax.sharding import make_mesh
from tests import toy

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def load_on_one_device(folder, dtype="float32", **kwargs):
    return load(str(folder), dtype, make_mesh(devices=toy.devices(1)), **kwargs)


def flat(checkpoint) -> dict:
    leaves = traverse_util.flatten_dict(checkpoint.params, sep="/")
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def assert_same(found, expected):
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype, path
        np.testing.assert_array_equal(found[path], array, err_msg=path)


def edit_json(path, **changes):
    contents = json.loads(path.read_text())
    contents.update({k: v for k, v in changes.items() if v is not ...})
    for key in [k for k, v in changes.items() if v is ...]:
        contents.pop(key, None)
    path.write_text(json.dumps(contents))


def spoil(folder, change):
    """Rewrites the transformer's tensors."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def poison(value):
    def change(tensors):
        tensors["transformer_blocks.1.ff.conv_depth.weight"][3, 0, 1, 1] = value

    return change
