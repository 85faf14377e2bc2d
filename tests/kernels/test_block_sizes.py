"""Every kernel compiles with its block sizes, for every kind of chip."""

import pytest

from tests.kernels.helpers import CHIPS, compile_for_tpu, operations

# In float32 the others fit into the VMEM of all chips, and these are plain.
BFLOAT16_ALONE = "cross_attention", "multiscale_attention", "scaled_product"


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", operations())
def test_compiles_for_tpu(name, chip):
    compile_for_tpu(name, chip)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    "name, dtype",
    [
        *((name, "bfloat16") for name in operations()),
        *((name, "float32") for name in operations() if name not in BFLOAT16_ALONE),
    ],
)
def test_compiles_for_tpu_at_full_width(name, dtype, chip):
    """An image of 1024 px in the 1.6B network: do the blocks fit into VMEM?"""
    sizes = dict(side=32, width=2240, hidden=5600, heads=20, rows=300)
    compile_for_tpu(name, chip, dtype=dtype, **sizes)
