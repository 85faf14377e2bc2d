"""The loop in one dispatch and with one dispatch a step, around a network of one line."""

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from sana_jax.checkpoints.components import abstract_params
from sana_jax.diffusion import dpm_solver
from sana_jax.models.dit import SanaConfig, SanaTransformer
from sana_jax.models.layers import IN_PLACE
from sana_jax.pipeline import denoise
from sana_jax.sharding import MESH_AXES


@dataclasses.dataclass(frozen=True)
class Config:
    timestep_scale: float = 1.0
    is_sprint: bool = False


class Network(nn.Module):
    """A velocity that depends on latents, timestep, text and its mask."""

    config: Config = Config()

    def keys_values(self, captions):
        return captions[None]  # (depth 1, B, L, C)

    def denoise(self, latents, timestep, keys_values, mask):
        text = (keys_values[0] * mask[..., None]).sum((1, 2))
        return 0.5 * latents + (1e-3 * timestep)[:, None, None, None] + text[:, None, None, None]


SMALL = SanaConfig(
    depth=2, width=32, head_dim=16, cross_heads=2, caption_channels=5, latent_channels=3
)


def inputs(halves):
    rng = np.random.default_rng(0)
    return SimpleNamespace(
        noise=jnp.asarray(rng.standard_normal((2, 2, 2, 3), np.float32)),
        captions=jnp.asarray(rng.standard_normal((2, halves, 4, 5), np.float32)),
        masks=jnp.asarray(rng.random((2, halves, 4)) < 0.7),
        scale=jnp.full((2, 1, 1, 1), 3.0),
        schedule=dpm_solver.flow_dpm_solver(5, 3.0),
    )


def run(given, sequential):
    arguments = given.noise, given.schedule, given.captions, given.masks, given.scale, None
    return denoise.sample(Network(), {}, *arguments, sequential=sequential)


@pytest.mark.parametrize("halves", [1, 2])
def test_a_dispatch_a_step_gives_the_same_and_shows_every_step(halves):
    given, seen = inputs(halves), []
    slow = denoise.sample_slowly(
        lambda i, latents: seen.append((i, latents)),
        *(Network(), {}, given.noise, given.schedule, given.captions),
        *(given.masks, given.scale, None),
        sequential=False,
    )
    np.testing.assert_allclose(slow, run(given, False), rtol=1e-6, atol=1e-6)
    assert [i for i, _ in seen] == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(seen[-1][1], slow)


def test_the_halves_of_guidance_may_be_computed_in_turn():
    given = inputs(2)
    np.testing.assert_allclose(run(given, True), run(given, False), rtol=1e-6, atol=1e-6)


def test_guidance_is_without_effect_where_both_halves_are_equal():
    given, alone = inputs(2), inputs(1)
    given.captions = given.captions.at[:, 0].set(given.captions[:, 1])
    given.masks = given.masks.at[:, 0].set(given.masks[:, 1])
    alone.captions, alone.masks = given.captions[:, 1:], given.masks[:, 1:]
    np.testing.assert_allclose(run(given, False), run(alone, False), rtol=1e-5, atol=1e-5)


def small(kind=None):
    """A small network, of which a layer's rows may be int8, and random weights."""
    kinds = (("blocks/attention/qkv", kind),) if kind else ()
    config, rng = dataclasses.replace(SMALL, quantised=kinds), np.random.default_rng(0)

    def drawn(x):
        numbers = 0.2 * rng.standard_normal(x.shape)
        return jnp.asarray(100 * numbers if x.dtype == jnp.int8 else numbers, x.dtype)

    return SanaTransformer(config), jax.tree.map(drawn, nn.unbox(abstract_params(config)))


@pytest.mark.parametrize("on, kind", [("gpu", None), ("tpu", None), ("tpu", "w8a8")])
def test_what_an_accelerator_gets_draws_the_same(monkeypatch, on, kind):
    """Layers by themselves; on a GPU visible rows first, for masks that hide rows anywhere."""
    (network, params), given = small(kind), inputs(2)

    def draw(sequential):
        steps = []
        return denoise.sample_slowly(
            lambda i, latents: steps.append(i),
            *(network, params, given.noise, given.schedule, given.captions),
            *(given.masks, given.scale, None),
            sequential=sequential,
        )

    drawn = draw(False)
    monkeypatch.setattr(denoise, "platform", lambda: on)
    for sequential in False, True:
        np.testing.assert_allclose(draw(sequential), drawn, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(denoise, "MOST_UNROLLED_LAYERS", 1)
    np.testing.assert_allclose(draw(False), drawn, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "on, kind, apart, in_place",
    [
        ("cpu", "w8a8", False, False),
        ("gpu", "w8a8", True, False),
        ("tpu", None, True, False),
        ("tpu", "w8", True, False),
        ("tpu", "w8a8", True, True),
        ("tpu", "w8a8_static", True, True),
    ],
)
def test_who_gets_layers_by_themselves(monkeypatch, on, kind, apart, in_place):
    """All but a CPU; a TPU's kernels read weights for int8 rows where they lie, without a copy."""
    (network, params), given = small(kind), inputs(2)
    monkeypatch.setattr(denoise, "platform", lambda: on)
    read, keys_values, _ = denoise._prepare(network, params, given.captions, given.masks)
    assert ("0001" in read["blocks"]) == isinstance(keys_values, dict) == apart
    if not apart:
        return
    kernel = read["blocks"]["0001"]["attention"]["qkv"]["kernel"]
    if in_place:
        assert kernel.values is None and int(kernel.layer) == 1
        stack = read["blocks"][IN_PLACE]["attention"]["qkv"]["kernel"]
        assert stack is params["blocks"]["attention"]["qkv"]["kernel"].values
    else:
        assert kernel.shape == (SMALL.width, 3 * SMALL.width)


def calls_on_cuda(fn, *args):
    """The custom calls of a program that is lowered for an H100."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda")
    types = (AxisType.Auto,) * len(MESH_AXES)
    mesh = AbstractMesh((1,) * len(MESH_AXES), MESH_AXES, types, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert not re.search(r"stablehlo\.(send|recv|infeed|outfeed)", text)
    return calls_of(text)


def calls_of(text):
    return set(re.findall(r"custom_call @([\w.$]+)", text))


def test_a_gpu_draws_in_one_program_that_never_asks_the_host():
    """So the host has nothing to do between its launches, and they can become CUDA graphs."""
    network, given = SanaTransformer(SMALL, dtype=jnp.bfloat16), inputs(2)
    params = nn.unbox(abstract_params(SMALL))

    def draw(params, *args):
        return denoise.sample(network, params, *args, None, sequential=False)

    args = given.noise, given.schedule, given.captions, given.masks, given.scale
    assert calls_on_cuda(draw, params, *args) == {"__gpu$xla.gpu.triton"}

    def with_host(x):
        jax.debug.callback(print, x)
        return x

    # What the line above would find; some processes refuse to lower it for a GPU that is not there.
    asks = calls_of(jax.jit(with_host).lower(given.noise).as_text())
    assert any("callback" in call for call in asks)
