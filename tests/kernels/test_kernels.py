"""The kernels against float64 formulas, forward and backward, and through the real compilers.

TPU kernels run in Pallas' TPU interpreter and compile for chips that are not here; GPU kernels run
in the plain interpreter and are lowered for CUDA.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from sana_jax.kernels import bias, dispatch
from sana_jax.kernels.cross_attention import api as cross
from sana_jax.kernels.cross_attention import tpu as cross_tpu
from sana_jax.kernels.glumbconv import api as glu
from sana_jax.kernels.glumbconv import gpu as glu_gpu
from sana_jax.kernels.glumbconv import tpu as glu_tpu
from sana_jax.kernels.linear_attention import api as linear
from sana_jax.kernels.linear_attention import gpu as linear_gpu
from sana_jax.kernels.linear_attention import tpu as linear_tpu
from sana_jax.kernels.modulated_norm import tpu as norm_tpu
from sana_jax.kernels.modulated_norm.api import modulated_norm
from sana_jax.kernels.res_block import api as residual
from sana_jax.kernels.res_block import tpu as residual_tpu
from sana_jax.models.dc_ae import ResBlock
from sana_jax.sharding import MESH_AXES, make_mesh
from tests import toy

EPSILON = 1e-15
CHIPS = "v5e", "v5p", "v6e"
TOLERANCE = {"float32": 1e-6, "bfloat16": 8e-3}  # bfloat16 keeps eight bits: 4e-3 a rounding
rng = np.random.default_rng(0)


def normal(*shape):
    return rng.standard_normal(shape)


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def check(run, formula, arrays, dtype):
    """`run(arrays, cotangent)` -> (out or several of them, gradients), against `formula`."""
    arrays = [jnp.asarray(array, dtype) for array in arrays]
    exact = [np.asarray(array, np.float64) for array in arrays]
    with jax.enable_x64(True):
        out, pull_back = jax.vjp(formula, *exact)
        cotangent = jnp.asarray(normal(*out.shape), dtype)
        gradients = pull_back(jnp.asarray(np.asarray(cotangent, np.float64)))
        expected = [np.asarray(x) for x in (out, *gradients)]
    found_out, found_gradients = jax.jit(run)(arrays, cotangent)
    outs = jax.tree.leaves(found_out)
    expected = [expected[0]] * len(outs) + expected[1:]
    for found, exact in zip((*outs, *found_gradients), expected, strict=True):
        error = relative_error(found.reshape(exact.shape), exact)
        assert error < TOLERANCE[dtype], error


def softmax_free_attention(qkv, head_dim):
    q, k, v = (x.reshape(*x.shape[:2], -1, head_dim) for x in jnp.split(qkv, 3, axis=-1))
    weights = jnp.einsum("bnhd,bmhd->bhnm", jnp.maximum(q, 0), jnp.maximum(k, 0))
    total = jnp.moveaxis(weights.sum(-1), 1, 2)[..., None] + EPSILON
    return (jnp.einsum("bhnm,bmhd->bnhd", weights, v) / total).reshape(*qkv.shape[:2], -1)


def mix_ffn_middle(value, gate, bias, kernel, depthwise_bias):
    u = jax.nn.silu(jnp.concatenate([value, gate], axis=-1) + bias)
    height, width = u.shape[1:3]
    u = jnp.pad(u, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = (u[:, i : i + height, j : j + width] * kernel[i, j] for i, j in np.ndindex(3, 3))
    value, gate = jnp.split(sum(shifts) + depthwise_bias, 2, axis=-1)
    return value * jax.nn.silu(gate)


def run_linear(module, head_dim, arrays, cotangent):
    (qkv,) = arrays
    state = module.state(qkv, head_dim)
    out = module.apply(qkv, state, head_dim, EPSILON)
    d_state = module.state_cotangent(qkv, state, cotangent, head_dim, EPSILON)
    return out, [module.cotangents(qkv, state, d_state, cotangent, head_dim, EPSILON)]


def run_glumbconv(module, arrays, cotangent):
    value, gate, *weights = arrays
    operands = (value, gate, *glu._by_halves(*weights))
    out, *gradients = module.backward(*operands, cotangent)
    return (module.forward(*operands), out), gradients


def glumbconv_arrays(batch, height, width, channels):
    image = batch, height, width, channels
    wide = 2 * channels
    return normal(*image), normal(*image), normal(wide), normal(3, 3, wide), normal(wide)


@pytest.fixture
def on_tpu():
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        yield


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(pl, "pallas_call", partial(pl.pallas_call, interpret=True))


# Heads that do not fill the last group, tokens that do not fill the last block.
LINEAR = [(2, 24, 96, 32, 512), (1, 40, 224, 32, 32), (1, 19, 192, 16, 16)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("batch, tokens, channels, head_dim, block", LINEAR)
def test_linear_attention_on_tpu(
    on_tpu, monkeypatch, batch, tokens, channels, head_dim, block, dtype
):
    monkeypatch.setattr(linear_tpu, "TOKENS", block)
    formula = partial(softmax_free_attention, head_dim=head_dim)
    run = partial(run_linear, linear_tpu, head_dim)
    check(run, formula, [normal(batch, tokens, 3 * channels)], dtype)


@pytest.mark.parametrize("tokens, channels", [(70, 96), (128, 32)])
def test_linear_attention_on_gpu(on_gpu, tokens, channels):
    formula = partial(softmax_free_attention, head_dim=32)
    run = partial(run_linear, linear_gpu, 32)
    check(run, formula, [normal(2, tokens, 3 * channels)], "float32")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 4, 8, 128), (1, 5, 6, 200), (1, 3, 16, 40)])
def test_glumbconv_on_tpu(on_tpu, shape, dtype):
    run = partial(run_glumbconv, glu_tpu)
    check(run, mix_ffn_middle, glumbconv_arrays(*shape), dtype)


@pytest.mark.parametrize("shape", [(2, 4, 8, 64), (1, 3, 11, 40)])
def test_glumbconv_on_gpu(on_gpu, shape):
    run = partial(run_glumbconv, glu_gpu)
    check(run, mix_ffn_middle, glumbconv_arrays(*shape), "float32")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens, channels", [(32, 128), (21, 72)])
def test_modulated_norm_on_tpu(on_tpu, monkeypatch, tokens, channels, dtype):
    monkeypatch.setattr(norm_tpu, "TOKENS", 16)

    def formula(x, shift, scale):
        y = x - x.mean(-1, keepdims=True)
        y = y / jnp.sqrt((y * y).mean(-1, keepdims=True) + 1e-6)
        return y * (1 + scale) + shift + x  # the residual's use of x, with the same cotangent

    def run(arrays, cotangent):
        x, shift, scale = arrays
        shift, scale = shift.astype(jnp.float32), scale.astype(jnp.float32)
        out = norm_tpu.forward(x, shift, scale).astype(jnp.float32) + x
        return out, norm_tpu.backward(x, cotangent, cotangent, scale)

    vector = 2, 1, channels
    check(run, formula, [normal(2, tokens, channels), normal(*vector), normal(*vector)], dtype)


@pytest.mark.parametrize("dtype", ["bfloat16"])  # what the kernel is offered for
@pytest.mark.parametrize("tokens, rows, channels, heads", [(32, 20, 144, 2), (21, 37, 112, 1)])
def test_cross_attention_on_tpu(on_tpu, monkeypatch, tokens, rows, channels, heads, dtype):
    for name in ("TOKENS", "BACKWARD_TOKENS"):
        monkeypatch.setattr(cross_tpu, name, 16)
    mask = rng.random((2, rows)) < 0.6
    mask[0] = False  # nothing to see: a softmax over all rows

    def formula(q, kv):
        q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, *jnp.split(kv, 2, axis=-1)))
        logits = jnp.einsum("bnhd,blhd->bhnl", q, k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(logits + jnp.where(mask, 0, -1e4)[:, None, None], axis=-1)
        return jnp.einsum("bhnl,blhd->bnhd", weights, v).reshape(*q.shape[:2], -1)

    def run(arrays, cotangent):
        bias = cross._bias(jnp.asarray(mask))
        out = cross_tpu.forward(*arrays, bias, heads)
        return out, cross_tpu.backward(*arrays, bias, cotangent, heads)

    check(run, formula, [normal(2, tokens, channels), normal(2, rows, 2 * channels)], dtype)


def run_public(fn, arrays, cotangent):
    """A public function, differentiated as a network does it."""
    out, pull_back = jax.vjp(fn, *arrays)
    return out, pull_back(cotangent)


@pytest.fixture(params=["tpu", "cuda"])
def split_tokens(request, monkeypatch):
    """Two images over fsdp=2, their tokens over sequence=2, with the kernels of a platform."""
    request.getfixturevalue({"tpu": "on_tpu", "cuda": "on_gpu"}[request.param])
    for api in (linear, glu):
        kernel = lambda *args, plain, **kernels: kernels[request.param](*args)  # noqa: E731
        monkeypatch.setattr(api, "by_platform", kernel)
    with jax.set_mesh(make_mesh(replica=1, fsdp=2, sequence=2, devices=toy.devices(4))):
        yield


def test_linear_attention_of_split_tokens(split_tokens):
    attention = partial(linear.linear_attention, head_dim=32, implementation="pallas")
    formula = partial(softmax_free_attention, head_dim=32)
    check(partial(run_public, attention), formula, [normal(2, 24, 3 * 96)], "float32")


def middle_and_product(*arrays):
    *arrays, projection, scale = arrays
    return mix_ffn_middle(*arrays) @ projection * scale


def projected(split_rows, value, gate, *arrays):
    *weights, projection, scale = arrays
    images, weights = (value, gate), tuple(weights)
    return glu.projected_glumbconv(split_rows, images, weights, projection, scale)


PROJECTED = *glumbconv_arrays(2, 4, 8, 40), normal(40, 24), normal(2, 1, 1, 24)


def test_glumbconv_of_split_rows(split_tokens):
    """Biases of all signs: what stands outside the image must not pass through SiLU as a zero."""
    check(partial(run_public, partial(projected, True)), middle_and_product, PROJECTED, "float32")


@pytest.mark.parametrize("platform", ["tpu", "other"])
def test_projected_glumbconv(on_tpu, monkeypatch, platform):
    """Without a mesh, by the kernel and in the plain form."""
    kernel = lambda *args, plain, **kernels: kernels.get(platform, plain)(*args)  # noqa: E731
    monkeypatch.setattr(glu, "by_platform", kernel)
    check(partial(run_public, partial(projected, False)), middle_and_product, PROJECTED, "float32")


@pytest.mark.parametrize("platform", ["tpu", "other"])
@pytest.mark.parametrize("shape", [(2, 40, 24), (3, 24), (24,)])
def test_add_bias(monkeypatch, platform, shape):
    kernel = lambda *args, plain, **kernels: kernels.get(platform, plain)(*args)  # noqa: E731
    monkeypatch.setattr(bias, "by_platform", kernel)
    arrays = [normal(*shape), normal(24)]
    check(partial(run_public, bias.add_bias), jnp.add, arrays, "bfloat16")


def residual_block(x, kernel1, bias1, kernel2, scale, bias):
    def convolve(x, kernel):
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        height, width = x.shape[1] - 2, x.shape[2] - 2
        return sum(x[:, i : i + height, j : j + width] @ kernel[i, j] for i, j in np.ndindex(3, 3))

    y = convolve(jax.nn.silu(convolve(x, kernel1) + bias1), kernel2)
    return x + y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def residual_arrays(batch, height, width, channels):
    kernel = 3, 3, channels, channels
    vectors = [normal(channels) for _ in range(3)]
    return (
        normal(batch, height, width, channels),
        *(normal(*kernel) / 40, vectors[0], normal(*kernel) / 40),
        *vectors[1:],
    )


@pytest.mark.parametrize("shape, rows", [((2, 24, 16, 128), 8), ((1, 12, 32, 128), 4)])
def test_residual_block_on_tpu(on_tpu, shape, rows):
    """Inner blocks of rows and those at the edges; the gradient is the plain form's."""
    assert residual_tpu.rows_at_once(*shape[1:]) == rows

    def run(arrays, cotangent):
        return residual_tpu.forward(*arrays), residual._backward(arrays, cotangent)

    check(run, residual_block, residual_arrays(*shape), "float32")
    arrays = [jnp.asarray(array, "bfloat16") for array in residual_arrays(*shape)]
    with jax.enable_x64(True):
        expected = residual_block(*(np.asarray(array, np.float64) for array in arrays))
    found = jax.jit(residual_tpu.forward)(*arrays)
    assert relative_error(found, expected) < TOLERANCE["bfloat16"]


def test_images_without_a_kernel_for_residual_blocks():
    shapes = (9, 16, 128), (8, 24, 128), (8, 16, 96), (8, 2**16, 128)
    assert not any(residual_tpu.rows_at_once(*shape) for shape in shapes)
    assert residual_tpu.rows_at_once(1024, 1024, 128) == 8
    assert not residual.uses_kernel((1, 8, 16, 128), "float32", "pallas")


def test_kernels_ask_for_what_the_chip_has():
    """A v5p has half of a v5e's VMEM: fewer rows at once there, or none."""
    shapes = (1024, 1024, 128), (256, 256, 512), (64, 64, 1024)
    rows, fits = {}, {}
    for chip in CHIPS:
        with jax.set_mesh(tpu_mesh(chip)):
            rows[chip] = [residual_tpu.rows_at_once(*shape) for shape in shapes]
            fits[chip] = glu_tpu.supported(128, 128, 2)
    assert rows == {"v5e": [8, 8, 4], "v5p": [4, 2, 0], "v6e": [8, 8, 4]}
    assert fits == {"v5e": True, "v5p": False, "v6e": True}


def test_float16_has_no_kernel():
    """Published Sana 1.0 weights run in it; Mosaic has no loads of it."""
    for dtype, has in ("bfloat16", True), (jnp.float32, True), (jnp.float16, False):
        assert dispatch.use_pallas("pallas", "it", dtype, None) == has
        assert glu.uses_kernel(8, 8, dtype, "pallas") == has
    for name in "linear_attention", "cross_attention", "modulated_norm":
        for dtype, has in ("bfloat16", True), ("float16", False):
            fn, operands = operations()[name]
            cast = [x.update(dtype=dtype) if x.dtype != bool else x for x in operands]
            assert ("pallas_call" in str(jax.make_jaxpr(fn)(*cast))) == has


@pytest.mark.parametrize("batch", [1, 8])
def test_the_module_s_residual_block_is_the_kernel_s(batch):
    """With and without it, from the same weights, on one device and on a mesh."""
    x = jnp.asarray(normal(batch, 8, 16, 128), jnp.bfloat16)
    plain, fused = (ResBlock(dtype="bfloat16", implementation=name) for name in ("xla", "pallas"))
    assert fused.uses_kernel(x) and not plain.uses_kernel(x)
    shapes = nn.unbox(jax.eval_shape(fused.init, jax.random.key(0), x))
    params = jax.tree.map(lambda leaf: jnp.asarray(normal(*leaf.shape) / 10), shapes)
    expected = plain.apply(params, x)[0].astype(jnp.float32)
    with jax.set_mesh(make_mesh(fsdp=4, tensor=2)):
        found = jax.jit(fused.apply)(params, x)[0].astype(jnp.float32)
    assert relative_error(found, expected) < TOLERANCE["bfloat16"]


def spec(*shape, dtype="bfloat16", sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def operations(sharding=None, side=8, width=224, hidden=160, heads=2, rows=20, dtype="bfloat16"):
    """Forward and backward of every operation, through its public function: (loss, operands)."""
    made = partial(spec, sharding=sharding, dtype=dtype)

    def loss(fn):
        def squares(*args):
            return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(fn(*args)))

        return jax.grad(squares, argnums=0)

    attention = partial(linear.linear_attention, head_dim=32, implementation="pallas")
    to_text = partial(cross.cross_attention, heads=heads, implementation="pallas")
    norm = partial(modulated_norm, implementation="pallas")
    tokens = side * side
    x, vector = made(1, tokens, width), made(1, 1, width)
    image, wide = made(1, side, side, hidden), made(2 * hidden)
    after = made(hidden, width), made(1, 1, 1, width)
    mask = made(1, rows, dtype="bool")
    square, channels = made(3, 3, 128, 128), made(128)
    return {
        "linear_attention": (loss(attention), (made(1, tokens, 3 * width),)),
        "glumbconv": (
            loss(partial(projected, True)),
            (image, image, wide, made(3, 3, 2 * hidden), wide, *after),
        ),
        "cross_attention": (loss(to_text), (x, made(1, rows, 2 * width), mask)),
        "modulated_norm": (loss(norm), (x, vector, vector)),
        "res_block": (
            residual.res_block,
            (made(1, 16, 16, 128), square, channels, square, channels, channels),
        ),
    }


@pytest.mark.parametrize("name", ["linear_attention", "glumbconv"])
def test_lowering_for_cuda(name):
    fn, args = operations()[name]
    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda")
    types = (AxisType.Auto,) * len(MESH_AXES)
    mesh = AbstractMesh((1,) * len(MESH_AXES), MESH_AXES, types, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "xla.gpu.triton" in text


def tpu_mesh(chip):
    pytest.importorskip("libtpu")
    from sana_jax import tpu_estimate

    axes = dict.fromkeys(MESH_AXES, 1)
    return tpu_estimate.tpu_mesh("2x2x1" if chip == "v5p" else "2x2", axes, chip)


def compile_for_tpu(name, chip, **sizes):
    mesh = tpu_mesh(chip)
    from sana_jax import tpu_estimate

    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    fn, args = operations(sharding, **sizes)[name]
    with jax.set_mesh(mesh):
        estimate = tpu_estimate.estimate(fn, *args, chip=chip)
    assert any(name in kernel for kernel in estimate.kernels)
    assert estimate.kernel_cycles > 0


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
        *((name, "float32") for name in operations() if name != "cross_attention"),  # has none
    ],
)
def test_compiles_for_tpu_at_full_width(name, dtype, chip):
    """An image of 1024 px in the 1.6B network: do the blocks fit into VMEM?"""
    sizes = dict(side=32, width=2240, hidden=5600, heads=20, rows=300)
    compile_for_tpu(name, chip, dtype=dtype, **sizes)


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
    from sana_jax import tpu_estimate

    mesh = tpu_estimate.tpu_mesh("2x2", dict(zip(MESH_AXES, (1, 1, 4, 1), strict=True)))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    fn, args = operations(sharding)[name]
    with jax.set_mesh(mesh):
        estimate = tpu_estimate.estimate(fn, *args)
    assert any(name in kernel for kernel in estimate.kernels)
    assert set(estimate.collectives) == {kind}
    assert estimate.collectives[kind][1] == pytest.approx(moved, rel=0.01)
