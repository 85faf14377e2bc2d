"""The picture that a scaling factor is measured on; tests/test_convert.py measures one."""

import numpy as np

from sana_jax.checkpoints import scale


def test_the_scene_is_the_same_picture_at_every_call_and_fills_its_range():
    first, again = scale.scene(64), scale.scene(64)
    np.testing.assert_array_equal(first, again)
    assert first.shape == (1, 64, 64, 3) and first.dtype == np.float32
    assert -1 <= first.min() < -0.5 and 0.5 < first.max() <= 1


def test_a_larger_scene_shows_the_same():
    """Means of 4 x 4 pixels of twice the size are near those of 2 x 2, but for the grain."""

    def means(picture, side):
        rows = len(picture) // side
        return picture.reshape(rows, side, rows, side, 3).mean((1, 3))

    small, large = means(scale.scene(64)[0], 2), means(scale.scene(128)[0], 4)
    assert np.abs(small - large).mean() < 0.05
