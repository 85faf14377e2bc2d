"""Arrays are restored as they were saved, or an error says why not."""

import errno

import numpy as np
import pytest

from sana_jax.runtime.errors import Retry
from sana_jax.training.checkpoints import arrays
from sana_jax.training.checkpoints.manager import Checkpoints
from tests.training.checkpoints.toy import CONFIG, DATA, abstract, make, restore, same


def test_flipped_bits_never_pass(folder):
    """A bit flipped at a random place of the file is noticed, or does not change the arrays."""
    random, step = np.random.default_rng(0), folder / "checkpoints" / "3"
    largest = max((step / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    sound, noticed = largest.read_bytes(), 0
    with Checkpoints(folder, CONFIG, DATA) as checkpoints:
        wanted, _ = arrays.flatten(abstract(make()))
        document = checkpoints._document(3)
        for place in random.integers(0, len(sound), 12):
            content = bytearray(sound)
            content[place] ^= 1 << random.integers(8)
            largest.write_bytes(content)
            try:
                found = arrays.read_arrays(step, document, wanted)
            except arrays.Damaged:
                noticed += 1
            else:
                assert same([*found.values()], [*arrays.flatten(make(3))[0].values()])
    assert noticed >= 9


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("no answer"),
        OSError(errno.ESTALE, "no answer"),
        ValueError("UNAVAILABLE: no answer"),  # raised by TensorStore
    ],
)
def test_unreadable_storage_is_to_be_tried_again(folder, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(arrays, "_restore", fail)
    with pytest.raises(Retry, match="no answer"):
        restore(folder)
    assert Checkpoints(folder, CONFIG, DATA).steps() == [1, 2, 3]
