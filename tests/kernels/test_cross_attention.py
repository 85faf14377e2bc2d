"""Cross-attention's kernel against its formula in float64, forward and backward."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.kernels import dispatch
from sana_jax.kernels.cross_attention import api, cross_attention, gpu, tpu, visible_first
from tests.kernels.helpers import (
    check,
    kernel_of,
    normal,
    relative_error,
    rng,
    run_public,
    tpu_mesh,
)


def attention_to(mask, heads):
    """The formula, for a mask and a number of heads."""

    def formula(q, kv):
        q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, *jnp.split(kv, 2, axis=-1)))
        logits = jnp.einsum("bnhd,blhd->bhnl", q, k) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(logits + jnp.where(mask, 0, -1e4)[:, None, None], axis=-1)
        return jnp.einsum("bhnl,blhd->bnhd", weights, v).reshape(*q.shape[:2], -1)

    return formula


@pytest.mark.parametrize("dtype", ["bfloat16"])  # what the kernel is offered for
@pytest.mark.parametrize("tokens, rows, channels, heads", [(32, 20, 144, 2), (21, 37, 112, 1)])
def test_kernel_on_tpu(on_tpu, monkeypatch, tokens, rows, channels, heads, dtype):
    for name in ("TOKENS", "BACKWARD_TOKENS"):
        monkeypatch.setattr(tpu, name, 16)
    mask = rng.random((2, rows)) < 0.6
    mask[0] = False  # nothing to see: a softmax over all rows

    formula = attention_to(mask, heads)

    def run(arrays, cotangent):
        bias = api.hidden_bias(jnp.asarray(mask))
        out = tpu.forward(*arrays, bias, heads)
        return out, tpu.backward(*arrays, bias, cotangent, heads)

    check(run, formula, [normal(2, tokens, channels), normal(2, rows, 2 * channels)], dtype)


@pytest.mark.parametrize("chip, most", [("v5e", 1024), ("v5p", 608), ("v6e", 1024)])
def test_text_that_fits_into_vmem(chip, most):
    """A backward pass of 1024 rows needs 69 MB, by the compiler of libtpu 0.0.42."""
    with jax.set_mesh(tpu_mesh(chip)):
        assert [rows for rows in range(16, 2048, 16) if tpu.supported(rows, 2240)] == [
            *range(16, most + 1, 16)
        ]


def test_blocks_are_of_one_size():
    sizes = {(1024, 300): 1024, (1056, 300): 528, (21, 300): 32, (4096, 385): 512}
    assert {case: tpu._block(*case, 1024) for case in sizes} == sizes


@pytest.fixture
def like_a_gpu(monkeypatch):
    """A CPU that takes itself for a GPU, with JAX's own twin of cuDNN's attention."""
    for module in (dispatch, api):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    monkeypatch.setattr(api, "by_platform", kernel_of("cuda"))
    monkeypatch.setattr(gpu, "IMPLEMENTATION", "xla")


MASK = np.arange(20)[None] < np.array([[13], [20], [1], [0]])  # the last: a softmax over all rows


def test_form_on_gpu(like_a_gpu):
    """The lengths that cuDNN gets hide what the mask hides, forward and backward."""
    fn = partial(cross_attention, mask=jnp.asarray(MASK), heads=2)
    arrays = [normal(4, 9, 48), normal(4, 20, 96)]
    assert "pallas" not in str(jax.make_jaxpr(fn)(*(jnp.bfloat16(x) for x in arrays)))
    check(partial(run_public, fn), attention_to(MASK, 2), arrays, "bfloat16")


def test_cudnn_runs_in_half_precision_only(like_a_gpu, monkeypatch):
    traced = []
    monkeypatch.setattr(gpu, "forward", lambda q, kv, mask, heads: traced.append(q.dtype) or q)
    for dtype in "float32", "bfloat16", "float16":
        q, kv = (jnp.asarray(normal(4, n, c), dtype) for n, c in ((9, 48), (20, 96)))
        cross_attention(q, kv, jnp.asarray(MASK), 2)
    # Each is tried once without data.
    assert [str(dtype) for dtype in traced] == ["float32", *["bfloat16"] * 2, *["float16"] * 2]


def test_without_cudnn_the_plain_form_runs(like_a_gpu, monkeypatch):
    monkeypatch.setattr(gpu, "IMPLEMENTATION", "cudnn")  # this JAX has none
    q, kv = (jnp.asarray(normal(4, n, c), jnp.bfloat16) for n, c in ((9, 48), (20, 96)))
    found = cross_attention(q, kv, jnp.asarray(MASK), 2)
    exact = attention_to(MASK, 2)(*(np.asarray(x, np.float64) for x in (q, kv)))
    assert relative_error(found, exact) < 8e-3


def test_visible_rows_come_first():
    rows, mask = normal(2, 3, 7, 4), rng.random((2, 3, 7)) < 0.5
    found, moved = visible_first(jnp.asarray(rows), jnp.asarray(mask))
    for place in np.ndindex(2, 3):
        row, seen = rows[place], mask[place]
        np.testing.assert_allclose(found[place], np.concatenate([row[seen], row[~seen]]), 1e-6)
        assert list(moved[place]) == sorted(seen, reverse=True)
