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
    settings = Settings("tiny", part, batch=2, size=64, dtype=dtype, steps=2)
    ours, theirs = Ours(settings), Diffusers(settings)
    for side in ours, theirs:
        side.load()
    for call in 0, 1:
        found, expected = (side.to_numpy(side.run(call)) for side in (ours, theirs))
        assert found.dtype == expected.dtype == np.float32
        toy.assert_close(found, expected, bar, f"{part} {dtype}")
    found = theirs.describe()
    assert {"torch", "diffusers", "reference_platform"} == set(found)
    assert found["reference_platform"] == ("gpu" if torch.cuda.is_available() else "cpu")
