"""Tables between our parameters and others' tensors: both ways, and what does not fit is named."""

import numpy as np
import pytest

from sana_jax.checkpoints.mapping import LINEAR, Entry, write_params
from sana_jax.checkpoints.tensors import LazyArray
from sana_jax.runtime.errors import UserError
from tests.checkpoints.folders import load_on_one_device, poison, spoil

KEY_VALUE = Entry("kv/kernel", ("{i}.k.weight", "{i}.v.weight"), LINEAR, layers=range(1, 3))


def their_tensors() -> dict[str, np.ndarray]:
    generator, names = np.random.default_rng(0), [f"{i}.{t}.weight" for i in (1, 2) for t in "kv"]
    return {name: generator.standard_normal((4, 3), np.float32) for name in names}


def test_an_entry_joins_transposes_and_stacks_and_goes_back():
    theirs = their_tensors()
    ours = KEY_VALUE.read(theirs)
    joined = [np.concatenate([theirs[f"{i}.k.weight"], theirs[f"{i}.v.weight"]]).T for i in (1, 2)]
    np.testing.assert_array_equal(ours, joined)
    written = dict(KEY_VALUE.write(ours))
    assert written.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(written[name], array)
    assert KEY_VALUE.their_shapes(ours.shape) == dict.fromkeys(theirs, (4, 3))
    assert KEY_VALUE.read(theirs, "float16").dtype == np.float16


def test_a_stack_is_read_once_for_all_its_layers():
    theirs, reads = their_tensors(), []

    def read(dtype):
        reads.append(dtype)
        return KEY_VALUE.read(theirs, dtype)

    params = {"kv": {"kernel": LazyArray((2, 3, 8), np.dtype("float32"), read)}}
    written = dict(write_params([KEY_VALUE], params))
    assert reads == [] and {lazy.shape for lazy in written.values()} == {(4, 3)}
    for name, array in theirs.items():
        np.testing.assert_array_equal(np.asarray(written[name]), array)
    assert len(reads) == 1


def rename(tensors):
    tensors["proj.weight"] = tensors.pop("proj_out.weight")


def transpose(tensors):
    tensors["caption_projection.linear_1.weight"] = tensors[
        "caption_projection.linear_1.weight"
    ].T.contiguous()


@pytest.mark.parametrize(
    "change, words",
    [
        (rename, ["missing proj_out.weight", "unexpected proj.weight"]),
        (transpose, ["caption_projection.linear_1.weight is [48, 64] instead of [64, 48]"]),
        (lambda t: t.update({"proj_out.bias": t["proj_out.bias"].int()}), ["proj_out.bias is I32"]),
        (lambda t: t.clear(), ["missing", "in all)"]),
        (poison(float("nan")), ["conv_depth.weight", "NaN"]),
        (poison(float("inf")), ["conv_depth.weight", "Inf"]),
    ],
)
def test_wrong_tensors_are_named(folder, change, words):
    spoil(folder, change)
    with pytest.raises(UserError) as error:
        load_on_one_device(folder)
    for word in [*words, "transformer"]:
        assert word in str(error.value), error.value
    assert "\n" not in str(error.value)


def test_values_beyond_float16_are_named(folder):
    spoil(folder, poison(1e6))
    load_on_one_device(folder, "bfloat16")
    with pytest.raises(UserError, match="conv_depth.weight overflows float16"):
        load_on_one_device(folder, "float16")
