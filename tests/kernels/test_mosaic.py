"""What the kernels for TPU share."""

import jax
import numpy as np

from sana_jax.kernels.glumbconv import tpu as glumbconv
from sana_jax.kernels.mosaic import half_silu
from sana_jax.kernels.res_block import tpu as res_block
from tests.kernels.helpers import CHIPS, normal, tpu_mesh


def test_kernels_ask_for_what_the_chip_has():
    """A v5p has half of a v5e's VMEM: fewer rows at once there, or none."""
    shapes = (1024, 1024, 128), (256, 256, 512), (64, 64, 1024)
    rows, fits = {}, {}
    for chip in CHIPS:
        with jax.set_mesh(tpu_mesh(chip)):
            rows[chip] = [res_block.rows_at_once(*shape) for shape in shapes]
            fits[chip] = glumbconv.supported(128, 128, 2)
    assert rows == {"v5e": [8, 8, 4], "v5p": [4, 2, 0], "v6e": [8, 8, 4]}
    assert fits == {"v5e": True, "v5p": False, "v6e": True}


def test_half_silu_is_silu_of_twice_its_argument():
    h = normal(100).astype(np.float32)
    np.testing.assert_allclose(half_silu(h), jax.nn.silu(2 * h), rtol=1e-5, atol=1e-6)
