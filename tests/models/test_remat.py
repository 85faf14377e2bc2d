"""The loop that keeps inputs alone, beside the same layers one after the other."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.measure import tpu_estimate
from sana_jax.models.remat import remat_scan
from tests import toy

DEPTH = 3


def layer(x, row, shift, mask):
    """Takes floats of two types, whole numbers, keys and a mask."""
    noise = jax.random.normal(row["key"], x["tokens"].shape)
    hidden = jnp.tanh(x["tokens"] @ row["kernel"].astype(jnp.float32) * row["step"] + noise)
    return {"tokens": hidden + jnp.where(mask, shift, 0.0), "sum": x["sum"] + hidden.sum()}


def operands():
    rng = np.random.default_rng(0)
    stack = {
        "kernel": jnp.asarray(rng.standard_normal((DEPTH, 4, 4)), jnp.bfloat16),
        "step": jnp.arange(1, DEPTH + 1),
        "key": jax.random.split(jax.random.key(0), DEPTH),
    }
    x = {"tokens": rng.standard_normal((5, 4), np.float32), "sum": np.float32(0)}
    mask = rng.random((5, 1)) < 0.6
    return x, stack, rng.standard_normal((5, 4), np.float32), mask


def one_after_the_other(x, stack, *shared):
    for i in range(DEPTH):
        x = layer(x, jax.tree.map(lambda rows, i=i: rows[i], stack), *shared)
    return x


def gradients(run):
    x, stack, shift, mask = operands()

    def loss(x, kernel, shift):
        out = run(x, stack | {"kernel": kernel}, shift, mask)
        return (out["tokens"] ** 2).sum() + jnp.sin(out["sum"])

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, stack["kernel"], shift)


def test_values_and_gradients_are_those_of_layers_one_after_the_other():
    found, expected = (gradients(run) for run in (partial(remat_scan, layer), one_after_the_other))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert ours.dtype == theirs.dtype
        toy.assert_close(ours, theirs, 1e-6)


def test_only_the_inputs_of_layers_are_kept():
    x, *rest = operands()
    _, pull = jax.eval_shape(partial(jax.vjp, partial(remat_scan, layer)), x, *rest)
    inputs = jax.tree.map(lambda x: jnp.stack([x] * DEPTH), x)
    expected = [x.shape for x in jax.tree.leaves((inputs, rest))]
    assert sorted(x.shape for x in jax.tree.leaves(pull)) == sorted(expected)


def gradient_of_products(stack, x):
    def loss(stack):
        return remat_scan(lambda x, w: jnp.tanh(x @ w), x, stack).astype(jnp.float32).sum()

    return jax.grad(loss)(stack)


@pytest.mark.skipif(not tpu_estimate.has_libtpu(), reason="libtpu is not installed")
def test_a_tpu_does_not_fill_the_stack_of_gradients_first():
    """It does for a scan. Each of four chips has a quarter of the stack."""
    mesh = tpu_estimate.tpu_mesh("2x2", {"fsdp": 4})
    x, stack = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P(*axes)))
        for shape, axes in (((2048, 1024), ["fsdp"]), ((8, 1024, 1024), [None, "fsdp"]))
    )
    compiled = jax.jit(gradient_of_products, out_shardings=stack.sharding).lower(stack, x).compile()
    start = (
        r'= bf16\[8,(\d+,\d+)\]\S* (?:(broadcast)\(|custom-call\(\), custom_call_target="(\w+)")'
    )
    made = {(shape, *how) for shape, *how in re.findall(start, compiled.as_text())}
    assert made == {(shape, "", "AllocateBuffer") for shape in ("256,1024", "512,1024")}


def test_a_gpu_splits_the_stack_of_gradients():
    """Its compiler would give every device all of a stack that starts uninitialised."""
    traced = jax.jit(gradient_of_products).trace(jnp.ones((8, 4, 4)), jnp.ones((2, 4)))
    programs = {name: traced.lower(lowering_platforms=(name,)) for name in ("cuda", "tpu")}
    found = {name: "AllocateBuffer" in program.as_text() for name, program in programs.items()}
    assert found == {"cuda": False, "tpu": True}
