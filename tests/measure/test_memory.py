"""The compiler's account: weights to the byte, and what a picture of full size takes."""

import math

import jax
import pytest

from sana_jax.checkpoints.components import param_shapes, place
from sana_jax.measure import inputs, memory, tpu_estimate
from sana_jax.measure.inputs import Settings
from sana_jax.sharding import MESH_AXES, make_mesh


def test_the_account_adds_up():
    settings = Settings("tiny", "memory", 1, 64, "bfloat16", 2)
    found, checkpoint = memory.analyse(settings), inputs.checkpoint(settings)
    for name, config in checkpoint.configs().items():
        sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(config))]
        assert found["weights"][name] == 2 * sum(sizes)
    weights, working = found["weights"], found["working"]
    assert all(size > 0 for size in working.values())
    assert found["peak"] == sum(weights.values()) + max(working.values())
    without = weights["dit"] + weights["vae"] + max(working["loop"], working["decode"])
    assert found["peak_without_text_encoder"] == without < found["peak"]
    assert working["decode"] > 4 * 64 * 64 * 3  # the picture, in float32


@pytest.mark.slow
def test_int8_is_counted_as_it_is_stored():
    settings = Settings("tiny", "memory", 1, 64, "bfloat16", 2, quantise="w8a8")
    found, checkpoint = memory.analyse(settings), inputs.checkpoint(settings)
    for name, config in checkpoint.configs().items():
        mesh = make_mesh(devices=jax.devices()[:1])
        placed = place(checkpoint.params[name], config, "bfloat16", mesh)
        assert found["weights"][name] == sum(x.nbytes for x in jax.tree.leaves(placed))


@pytest.mark.slow
@pytest.mark.parametrize("size, bound", [(1024, 6.5e9), (4096, 12e9)])
def test_a_picture_of_sana_1600m_in_int8_fits(size, bound):
    """All networks resident; bfloat16's weights alone are 9.06 GB. 4096 px are decoded in tiles."""
    preset = f"sana_1600m_{size}"
    settings = Settings(preset, "memory", 1, size, "bfloat16", 20, quantise="w8a8")
    found = memory.analyse(settings)
    print(found)
    assert found["peak"] <= bound


@pytest.mark.parametrize("platform", ["cpu", pytest.param("tpu", marks=pytest.mark.slow)])
def test_a_picture_of_1024_px_fits_9_gb(platform):
    """0.6B in bfloat16, weights of 7.04 GB; 4 GB hold it once the prompts are encoded."""
    mesh = None
    if platform == "tpu":
        mesh = tpu_estimate.tpu_mesh("2x2", dict.fromkeys(MESH_AXES, 1))
    settings = Settings("sana_600m_1024", "memory", 1, 1024, "bfloat16", 20)
    found = memory.analyse(settings, mesh)
    print(found)
    assert found["platform"] == platform
    assert found["peak"] < 9e9 and found["peak_without_text_encoder"] < 4e9
