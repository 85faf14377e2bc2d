"""Fingerprints notice any change, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import sharding
from sana_jax.training.checkpoints.checksums import checksums

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "float8_e4m3fn"]


def random_bits(shape, dtype, seed=0):
    """Returns an array of random bits, with NaN and -0.0 among them."""
    dtype = jnp.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    content = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    return content.view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_flipped_bit_changes_it(dtype):
    array = random_bits((5, 7), dtype)
    sound = checksums(array)
    assert checksums(array.copy()) == sound
    for bit in range(array.nbytes * 8):
        flipped = array.copy()
        flipped.view(np.uint8).reshape(-1)[bit // 8] ^= 1 << bit % 8
        assert checksums(flipped) != sound, bit


def test_several_flipped_bits_change_it():
    """Also of the same bit of two elements, which a sum of products would not notice."""
    array, random = random_bits((64, 32), "float32"), np.random.default_rng(1)
    sound = checksums(array)
    for count in [2, 2, 2, 3, 10, 1000] * 10:
        flipped = array.copy()
        flipped.view(np.uint32).reshape(-1)[random.choice(2048, count, replace=False)] ^= 1 << 31
        assert checksums(flipped) != sound, count


def test_order_and_kind_of_zero_count():
    tree = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([2.0, 1.0]), "c": jnp.zeros(2)}
    tree |= {"d": -jnp.zeros(2), "e": jnp.zeros(3), "f": jnp.zeros((1, 2))}
    found = checksums(tree)
    assert len({*found.values()}) == 5 and found["c"] == found["f"]


def test_keys_and_truth_values():
    assert checksums(jax.random.key(0)) != checksums(jax.random.key(1))
    assert checksums(jnp.array([True, False])) != checksums(jnp.array([False, True]))
    assert isinstance(checksums(jnp.array(True)), int)


def test_is_that_of_the_formula():
    """Computes the fingerprint in Python integers."""

    def mix(x):
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    array = random_bits((3, 2, 5), "bfloat16")
    bits = array.view(np.uint16).reshape(-1).tolist()
    wanted = sum(mix(b ^ mix(i)) for i, b in enumerate(bits)) % 2**32
    assert checksums(array) == wanted


def test_mesh_does_not_matter():
    array = random_bits((16, 8), "float32")
    mesh = sharding.make_mesh(fsdp=4)
    specs = [("fsdp", None), (None, ("replica", "fsdp")), (None, None), ("replica", "fsdp")]
    for spec in specs:
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        assert checksums(jax.device_put(array, where)) == checksums(array)
