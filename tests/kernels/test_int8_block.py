"""A block with int8 products: the kernels in the interpreter against the plain form."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sana_jax.kernels import dispatch
from sana_jax.kernels.int8 import (
    Quantised,
    join,
    layer_of,
    multiply,
    part,
    reference,
    rows,
    tpu,
)
from sana_jax.kernels.int8_block import api, takes
from sana_jax.kernels.linear_attention import tpu as attention_on_tpu
from sana_jax.kernels.modulated_norm import reference as norm
from sana_jax.kernels.modulated_norm import tpu as norm_on_tpu
from sana_jax.models.dit import Block, SanaConfig
from sana_jax.models.layers import scan_for_sampling
from sana_jax.models.remat import REMAT
from sana_jax.sharding import make_mesh
from tests import toy
from tests.kernels.helpers import CHIPS, kernel_of, relative_error, spec, tpu_mesh

rng = np.random.default_rng(0)


def normal(*shape, dtype="bfloat16"):
    return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)


def layer_in_place(stack, i):
    rest, values = part(stack)
    return join(layer_of(rest, i), values)


def weight(inputs, outputs) -> Quantised:
    kernel = normal(inputs, outputs, dtype="float32") * inputs**-0.5
    scale = reference.scale_of(kernel, 0)
    return Quantised(reference.values_of(kernel, scale), scale, rows="int8")


def one_step_at_most(found, expected):
    """`found` are the int8 rows of `expected`, but for numbers that lie between two integers.

    Sums and divisions of the kernel may differ in the last place, which bfloat16 seldom shows.
    """
    exact = rows.quantised(expected)
    steps = np.abs(np.asarray(found.values, int) - np.asarray(exact.values, int))
    assert steps.max() <= 1 and (steps > 0).mean() < 0.01
    np.testing.assert_allclose(found.scale, exact.scale, rtol=2**-8)


@pytest.mark.parametrize("inputs, outputs", [(128, 96), (96, 130)])
def test_products_are_the_plain_ones_to_the_bit(on_tpu, inputs, outputs):
    """Of weights whose inputs lie along the lanes, of such whose outputs do, and of ragged ones."""
    x, kernel, bias = normal(2, 40, inputs), weight(inputs, outputs), normal(outputs)
    expected = multiply(x, kernel) + bias
    for found in rows.quantised(x), x:
        y = tpu.product(found, kernel, bias, x.dtype)
        np.testing.assert_array_equal(y, expected)
    second = layer_in_place(jax.tree.map(lambda x: jnp.stack([0 * x, x]), kernel), 1)
    assert second.shape == kernel.shape
    np.testing.assert_array_equal(multiply(x, second) + bias, expected)
    half = outputs // 2
    for columns in (0, half), (half, outputs):
        y = tpu.product(x, second, bias, x.dtype, columns)
        np.testing.assert_array_equal(y, expected[..., slice(*columns)])


@pytest.mark.parametrize("then", ["", "rows", "norm"])
def test_the_sum_after_a_product_and_its_rows(on_tpu, then):
    x, y, kernel, bias = normal(2, 40, 96), normal(2, 40, 64), weight(64, 96), normal(96)
    gate, *modulation = (normal(2, 1, 96, dtype="float32") for _ in range(3))
    more = tuple(modulation) if then == "norm" else ()
    found, made = tpu.add_product(x, y, kernel, bias, gate, then, more)
    branch = (multiply(y, kernel) + bias).astype("float32")
    expected = x + (gate * branch).astype("bfloat16")
    toy.assert_close(found.astype("float32"), expected.astype("float32"), 4e-3)
    if then:
        one_step_at_most(made, norm.modulated_norm(found, *modulation) if more else found)
    else:
        assert made is None


@pytest.mark.parametrize("tokens, channels", [(40, 96), (32, 256)])
def test_kernels_give_the_rows_of_their_results(on_tpu, monkeypatch, tokens, channels):
    monkeypatch.setattr(norm_on_tpu, "TOKENS", 32)
    x, shift, scale = normal(2, tokens, channels), *(normal(2, 1, channels, dtype="float32"),) * 2
    made = norm_on_tpu.forward_rows(x, shift, scale)
    one_step_at_most(made, norm.modulated_norm(x, shift, scale))
    qkv = normal(2, tokens, 3 * channels)
    state = attention_on_tpu.state(qkv, 32)
    made = attention_on_tpu.apply_rows(qkv, state, 32, 1e-15)
    one_step_at_most(made, attention_on_tpu.apply(qkv, state, 32, 1e-15))


CONFIG = SanaConfig(width=224, cross_heads=2, sample_size=8)  # ragged against every power of two
FIELDS = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)


def stack_of_blocks(config=CONFIG, depth=2):
    """Random weights of some blocks, in int8 where there is a product for it."""
    shapes = jax.eval_shape(Block(config, **FIELDS).init, jax.random.key(0), *inputs(caption=True))
    params = jax.tree.map(lambda x: 0.1 * normal(depth, *x.shape), nn.unbox(shapes)["params"])
    for room, name in api.LAYERS:
        *_, channels, outputs = params[room][name]["kernel"].shape
        kernels = [weight(channels, outputs) for _ in range(depth)]
        params[room][name]["kernel"] = jax.tree.map(lambda *x: jnp.stack(x), *kernels)
    return params


def inputs(side=8, text_rows=20, caption=False):
    """x, keys and values or the text's rows, modulation and mask."""
    width = CONFIG.width
    text = normal(2, text_rows, width if caption else 2 * width)
    modulation = normal(2, 6, width, dtype="float32")
    mask = jnp.arange(text_rows)[None] < jnp.array([[text_rows], [3]])
    x = normal(2, side, side, width)
    return (x, modulation, text, mask) if caption else (x, text, modulation, mask)


def run(block, stack, *args):
    """The last block, of weights that stay in their stack."""

    @jax.jit
    def last(stack, i, *args):
        params = {"params": layer_in_place(stack, i)}
        return block.apply(params, *args, method="with_keys_values")[0]

    return last(stack, jnp.int32(1), *args).astype("float32")


@pytest.mark.parametrize("qk_norm", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_block_is_the_plain_one(on_tpu, monkeypatch, qk_norm):
    config = dataclasses.replace(CONFIG, qk_norm=qk_norm)
    stack, args = stack_of_blocks(config), inputs()
    expected = run(Block(config, implementation="xla", **FIELDS), stack, *args)
    monkeypatch.setattr(api, "by_platform", kernel_of("tpu"))
    found = run(Block(config, implementation="pallas", **FIELDS), stack, *args)
    assert relative_error(found, args[0]) > 0.5  # it does something
    assert relative_error(found, expected) < 0.01  # that of two bfloat16 forms


def test_gradients_are_those_of_the_plain_block():
    stack, args = stack_of_blocks(depth=1), inputs()
    params = jax.tree.map(lambda x: x[0], stack)

    def gradients(implementation):
        block = Block(CONFIG, implementation=implementation, **FIELDS)

        def loss(x, keys_values):
            rest = x, keys_values, *args[2:]
            y, _ = block.apply({"params": params}, *rest, method="with_keys_values")
            return jnp.sum(y.astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(loss, (0, 1)))(*args[:2])

    for found, expected in zip(gradients("pallas"), gradients("xla"), strict=True):
        assert relative_error(found, expected) < 0.02 and np.any(found)


def test_what_has_no_kernels_is_left_to_the_plain_form(monkeypatch):
    said = []
    monkeypatch.setattr(dispatch, "_say_once", said.append)
    params, (x, *_) = jax.tree.map(lambda x: x[0], stack_of_blocks()), inputs()
    asks = partial(takes, head_dim=32, implementation="pallas")
    assert asks(params, x, 20)
    assert not takes(params, x, 20, 32, "xla") and not takes(params, x, 20, 32, "auto")
    assert not asks(params, x.astype("float32"), 20) and not asks(params, x, 2000)
    assert len(said) == 1 and "2000 text rows" in said[0]
    for change in (
        {"lora": {}},
        {"kernel": dataclasses.replace(params["ffn"]["expand"]["kernel"], rows="float")},
        {"kernel": dataclasses.replace(params["ffn"]["expand"]["kernel"], range=jnp.ones(()))},
        {"kernel": normal(224, 1120)},
    ):
        ffn = params["ffn"] | {"expand": params["ffn"]["expand"] | change}
        assert not asks(params | {"ffn": ffn}, x, 20)


@pytest.fixture
def seen(monkeypatch):
    """The kernels' place is taken by a function that adds the power of two of its layer's number.

    The list has, of every block that was traced, whether its weights lie among those of all layers.
    """
    found = []

    def forward(x, modulation, keys_values, mask, params, **_):
        kernel = params["attention"]["qkv"]["kernel"]
        found.append(kernel.layer is not None)
        return x if kernel.layer is None else x + (1 << kernel.layer).astype(x.dtype)

    monkeypatch.setattr(api, "by_platform", kernel_of("tpu"))
    monkeypatch.setattr(api.tpu, "forward", forward)
    return found


BLOCK = Block(CONFIG, implementation="pallas", **FIELDS)


def test_layers_that_are_chosen_lie_where_they_say(seen):
    stack, (x, text, *rest) = stack_of_blocks(depth=4), inputs()
    layers, each = slice(1, 4, 2), jnp.stack([text, text])

    def denoise(stack, x):
        class Scanned:  # what scan_for_sampling asks of an nn.scan
            variables = {"params": stack}
            is_initializing = staticmethod(lambda: False)

        method = "with_keys_values"
        return scan_for_sampling(Scanned(), BLOCK, method, x, (each,), *rest, layers=layers)[0]

    np.testing.assert_array_equal(jax.jit(denoise)(stack, 0 * x).astype(int), 2**1 + 2**3)
    assert all(seen) and seen


@pytest.mark.parametrize(
    "axes, expected",
    [
        (dict(replica=2, fsdp=1), [True]),
        (dict(replica=1, fsdp=2), [False]),  # a layer alone is gathered, not the stack of all
        (dict(fsdp=1, tensor=2), []),
        (dict(fsdp=1, sequence=2), []),
    ],
)
def test_on_a_mesh(seen, axes, expected):
    stack, args = stack_of_blocks(), inputs()
    with jax.set_mesh(make_mesh(**axes, devices=toy.devices(2))):
        jax.eval_shape(partial(run, BLOCK), stack, *args)
    assert seen == expected


def test_its_input_can_be_offloaded():
    params, (x, *args) = jax.tree.map(lambda x: x[0], stack_of_blocks(depth=1)), inputs()

    def loss(x):
        y, _ = BLOCK.apply({"params": params}, x, *args, method="with_keys_values")
        return jnp.sum(y.astype(jnp.float32) ** 2)

    program = jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=REMAT["offload"])))(x)
    assert "<host>" in str(program)


def test_weights_of_all_published_widths_fit(monkeypatch):
    monkeypatch.setattr(tpu, "vmem_bytes", lambda: 50 * 2**20)  # of a v5p
    for width, hidden in ((1152, 2880), (2240, 5600)):
        for outputs in 3 * width, hidden:
            assert tpu.supported(width, outputs)
        assert tpu.supported(hidden, width)
    assert not tpu.supported(5600, 5600)


@pytest.mark.parametrize(
    "chip", ["v5e", *(pytest.param(c, marks=pytest.mark.slow) for c in CHIPS[1:])]
)
def test_a_block_compiles(chip):
    mesh = tpu_mesh(chip)
    from sana_jax.measure import tpu_estimate

    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    block = Block(CONFIG, implementation="auto", **FIELDS)
    stack = jax.eval_shape(stack_of_blocks)
    args = jax.tree.map(
        lambda x: spec(*x.shape, dtype=x.dtype, sharding=sharding), (stack, *inputs())
    )

    def last(stack, *args):
        params = {"params": layer_in_place(stack, 1)}
        return block.apply(params, *args, method="with_keys_values")[0]

    with jax.set_mesh(mesh):
        kernels = tpu_estimate.estimate(last, *args, chip=chip).kernels
    assert sum(calls for name, (calls, _) in kernels.items() if "int8_" in name) == 7
