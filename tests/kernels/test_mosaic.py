"""What the kernels for TPU share."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from sana_jax.kernels.glumbconv import tpu as glumbconv
from sana_jax.kernels.mosaic import MIB, compiler_params, half_silu
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


def test_a_kernel_asks_for_the_vmem_that_its_blocks_need():
    """Two buffers of each block in whole tiles, 16 MiB for values, within 32 MiB and the chip's."""
    row = pl.BlockSpec((1, 20, 130), lambda i: (i, 0, 0))  # 32 x 256 in bfloat16, 24 x 256 else
    array = jax.ShapeDtypeStruct((8, 20, 130), jnp.bfloat16)
    image = pl.BlockSpec((pl.Element(1), 4096, 1024), lambda i: (i, 0, 0))
    large = jax.ShapeDtypeStruct((8, 4096, 1024), jnp.float32)

    def limit(*args):
        params = compiler_params(("parallel",), *args)
        assert params.dimension_semantics == ("parallel",)
        return params.vmem_limit_bytes

    assert limit([(row, array)]) == 32 * MIB
    assert limit([(image, large)]) == (2 * 16 + 16) * MIB
    expected = (2 * 16 + 16) * MIB + 3 * MIB + 2 * 32 * 256 * 2
    assert limit([(image, large), (row, array)], 3 * MIB) == expected
    assert limit([(image, large)] * 3) == 100 * MIB
    with jax.set_mesh(tpu_mesh("v5p")):
        assert limit([(image, large)] * 3) == 50 * MIB
