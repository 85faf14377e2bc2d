"""Ranges of rows, and int8 weights with them."""

import jax
import numpy as np
import pytest

from sana_jax import SanaPipeline
from sana_jax.checkpoints import native
from sana_jax.checkpoints.load import place_all
from sana_jax.checkpoints.quantised import quantise
from sana_jax.pipeline.calibrate import Ranges, row_ranges
from sana_jax.runtime.errors import UserError
from sana_jax.sharding import make_mesh
from tests import mini
from tests.toy import relative_error

LAYERS = ["blocks/attention/qkv", "blocks/ffn/contract"]
CALLS = [{"prompt": "red circle", "seed": i, "num_steps": 2} for i in range(2)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    mini.save(path := tmp_path_factory.mktemp("base") / "float32", depth=2)
    return native.open_folder(path)


@pytest.fixture(scope="module")
def found(base):
    return row_ranges(base, LAYERS, CALLS)


def test_every_layer_has_the_largest_numbers_of_all_prompts(base, found):
    assert {name: x.shape for name, x in found.items()} == {
        "blocks/attention/qkv": (2, 32),
        "blocks/ffn/contract": (2, 80),
    }
    less = row_ranges(base, LAYERS, CALLS[:1])
    for name, ranges in found.items():
        assert (ranges >= less[name]).all() and (ranges > less[name]).any()
        assert (less[name] > 0).all()


def test_calibrated_weights_are_stored_and_run(base, found, tmp_path):
    layers = [(f"dit/{name}", "w8a8") for name in LAYERS] + [(".*", "none")]
    native.save(quantise(base, "w8a8", layers, found), tmp_path)
    made = native.open_folder(tmp_path)
    assert made.dit.quantised == tuple((name, "w8a8_static") for name in LAYERS)
    mesh = make_mesh(devices=jax.devices()[:1])
    pipe = SanaPipeline.from_pretrained(tmp_path, dtype="float32", mesh=mesh)
    kernel = pipe.params["dit"]["blocks"]["attention"]["qkv"]["kernel"]
    np.testing.assert_allclose(kernel.range, found[LAYERS[0]].max(-1) / 127, rtol=1e-6)
    place_all(base, "base", "float32", mesh)
    plain = SanaPipeline(base, mesh, "float32")
    latents = [np.asarray(p(**CALLS[0], output="latent")) for p in (pipe, plain)]
    assert 1e-4 < relative_error(*latents) < 0.05


def test_a_prompt_that_cannot_be_drawn_is_told_by_number(base):
    with pytest.raises(UserError, match="prompt 2 of 2: height 77 is not a multiple"):
        row_ranges(base, LAYERS, [CALLS[0], CALLS[1] | {"height": 77}])


def test_rows_that_are_not_finite_are_named():
    ranges = Ranges()
    ranges.tell("blocks/a", np.int32(0), np.array([1.0, np.nan]))
    ranges.tell("blocks/a", np.int32(0), np.array([2.0, 2.0]))
    with pytest.raises(UserError, match="the rows of blocks/a have NaN or infinite values"):
        ranges.found()
