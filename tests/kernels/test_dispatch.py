"""Which implementation runs where, and what devices exchange."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from sana_jax.kernels import dispatch
from sana_jax.kernels.glumbconv import api as glumbconv
from sana_jax.sharding import MESH_AXES
from tests.kernels.helpers import operations


def test_float16_has_no_kernel():
    """Published Sana 1.0 weights run in it; Mosaic has no loads of it."""
    for dtype, has in ("bfloat16", True), (jnp.float32, True), (jnp.float16, False):
        assert dispatch.use_kernel("pallas", "it", dtype, tpu=None, gpu=None) == has
        assert glumbconv.uses_kernel(8, 8, dtype, "pallas") == has
    for name in "linear_attention", "cross_attention", "modulated_norm":
        for dtype, has in ("bfloat16", True), ("float16", False):
            fn, operands = operations()[name]
            cast = [x.update(dtype=dtype) if x.dtype != bool else x for x in operands]
            assert ("pallas_call" in str(jax.make_jaxpr(fn)(*cast))) == has


def test_auto_on_a_gpu(monkeypatch):
    """The kernels with the lower bound, in half precision; float16 is what Sana 1.0 runs in."""
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
    for dtype, has in ("bfloat16", True), ("float16", True), ("float32", False):
        for name in dispatch.GPU_AUTO:
            assert dispatch.use_kernel("auto", name, dtype, tpu="it", gpu=None) == has
    assert not dispatch.use_kernel("auto", "modulated norm", "bfloat16", tpu=None, gpu=None)
    assert not dispatch.use_kernel("auto", "glumbconv", "bfloat16", tpu=None, gpu="it")
    assert dispatch.use_kernel("pallas", "glumbconv", "float32", tpu="it", gpu=None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["linear_attention", "glumbconv"])
def test_lowering_for_cuda(name, dtype):
    fn, args = operations(dtype=dtype)[name]
    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda")
    types = (AxisType.Auto,) * len(MESH_AXES)
    mesh = AbstractMesh((1,) * len(MESH_AXES), MESH_AXES, types, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "xla.gpu.triton" in text


# Forward, and the cotangent of the first operand: the state twice, and its cotangent; two halo rows
# of value and gate, and two that go home, of which the compiler's list counts operand and result.
@pytest.mark.parametrize(
    "name, kind, moved",
    [
        ("linear_attention", "all-reduce", 3 * (64 * 224 * 4)),
        ("glumbconv", "collective-permute", 6 * 2 * (8 * 160 * 2)),
    ],
)
def test_split_tokens_compile_for_tpu(name, kind, moved):
    """The kernels on a quarter of the tokens, and what they exchange: states, or halo rows."""
    pytest.importorskip("libtpu")
    from sana_jax.measure import tpu_estimate

    mesh = tpu_estimate.tpu_mesh("2x2", dict(zip(MESH_AXES, (1, 1, 4, 1), strict=True)))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    fn, args = operations(sharding)[name]
    with jax.set_mesh(mesh):
        estimate = tpu_estimate.estimate(fn, *args)
    assert any(name in kernel for kernel in estimate.kernels)
    assert set(estimate.collectives) == {kind}
    assert estimate.collectives[kind][1] == pytest.approx(moved, rel=0.01)
