"""Both sides compute the same, part by part."""

import numpy as np
import pytest
import torch

from sana_jax.measure.inputs import PARTS, Settings
from sana_jax.measure.ours import Ours
from sana_jax.measure.theirs import Diffusers
from tests import toy


@pytest.mark.parametrize(
    "part, dtype, bar", [*((part, "float32", 1e-5) for part in PARTS), ("trunk", "bfloat16", 0.05)]
)
def test_the_reference_agrees(part, dtype, bar):
    _check(Settings("tiny", part, batch=2, size=64, dtype=dtype, steps=2), bar)


@pytest.mark.parametrize("part", ["text", "trunk", "loop"])
def test_the_reference_of_sprint_agrees(part):
    _check(Settings("tiny_sprint", part, batch=2, size=64, dtype="float32", steps=4), 1e-5)


def _check(settings: Settings, bar: float) -> None:
    ours, theirs = Ours(settings), Diffusers(settings)
    for side in ours, theirs:
        side.load()
    for call in 0, 1:
        found, expected = (side.to_numpy(side.run(call)) for side in (ours, theirs))
        assert found.dtype == expected.dtype == np.float32
        toy.assert_close(found, expected, bar, f"{settings.part} {settings.dtype}")
    found = theirs.describe()
    assert {"torch", "diffusers", "reference_platform"} == set(found)
    assert found["reference_platform"] == ("gpu" if torch.cuda.is_available() else "cpu")
