"""What SanaPipeline's arguments may not be, and that the message names them."""

import dataclasses
import inspect

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sana_jax import SanaPipeline
from sana_jax.pipeline import request
from sana_jax.pipeline.request import Facts, Request
from sana_jax.runtime.errors import UserError
from tests.pipeline.test_pipeline import (  # noqa: F401 (fixtures)
    PROMPTS,
    draw,
    folder,
    ours,
    theirs,
)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(height=100), "height 100 is not a multiple of 32: try 96 or 128"),
        (dict(width=0), "width 0"),
        (dict(height=-32), "height -32"),
        (dict(height=32.5), "height 32.5"),
        (dict(height=True), "height True"),
        (dict(num_steps=0), "num_steps 0"),
        (dict(num_steps=10**9), "num_steps 1000000000"),
        (dict(guidance_scale=float("nan")), "guidance_scale nan"),
        (dict(seed=-1), "seed -1"),
        (dict(seed=2**64), "seed 18446744073709551616"),
        (dict(seed=np.bool_(True)), "seed True"),
        (dict(seed=np.float32(1)), "seed 1.0"),
        (dict(num_steps=jnp.float32(2)), "num_steps 2.0"),
        (dict(prompts="a" * (2**20 + 1)), "prompt has 1048577 characters: it takes up to 1048576"),
        (dict(negative_prompt=["", "a" * 2**21, ""]), "negative_prompt has 2097152 characters"),
        (dict(instruction="a" * 2**21), "instruction has 2097152 characters"),
        (dict(sequential_guidance="no"), "sequential_guidance 'no' is neither True nor False"),
        (dict(use_resolution_binning=np.ones(2)), "use_resolution_binning array([1., 1.])"),
        (dict(output=np.zeros(2)), "output array([0., 0.])"),
        (dict(seed=[1, 2]), "2 seeds for 3 images"),
        (dict(seed=None), "seed None"),
        (dict(seed=1.5), "seed 1.5"),
        (dict(seed=[1, 2, "3"]), "seed '3'"),
        (dict(num_steps=True), "num_steps True"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt 0"),
        (dict(num_images_per_prompt=1.5), "num_images_per_prompt 1.5"),
        (dict(guidance_scale="4"), "guidance_scale '4'"),
        (dict(guidance_interval=(0.5,)), "guidance_interval (0.5,)"),
        (dict(guidance_interval=0.5), "guidance_interval 0.5"),
        (dict(guidance_interval=(0.9, 0.1)), "guidance_interval (0.9, 0.1)"),
        (dict(guidance_interval=(None, 1)), "guidance_interval None"),
        (dict(guidance_interval=(float("nan"), 1)), "guidance_interval nan"),
        (dict(prompts=5), "prompt 5"),
        (dict(prompts=[None]), "prompt [None]"),
        (dict(negative_prompt=5), "negative_prompt 5"),
        (dict(negative_prompt=[1]), "negative_prompt [1]"),
        (dict(instruction=["a", "b"]), "instruction ['a', 'b']"),
        (dict(sampler=["x"]), "sampler ['x']"),
        (dict(flow_shift="3"), "flow_shift '3'"),
        (dict(flow_shift=1e-300), "flow_shift 1e-300"),
        (dict(on_step=5), "on_step 5"),
        (dict(latents=[[1]]), "latents is list"),
        (dict(latents=np.zeros((3, 4, 4, 8), np.int32)), "latents holds int32"),
        (dict(tile="x"), "tile 'x'"),
        (dict(tile=64), "tile 64"),
        (dict(tile=(64, 96)), "stride (96, 96)"),
        (dict(tile=(64, "a")), "'a'"),
        (dict(tile=(72, 64)), "tile (72, 64): 72 is not a multiple of 32"),
        (dict(prompt_embeddings=np.zeros((3, 300, 48))), "not both"),
        (dict(prompts=None), "give a prompt"),
        (dict(prompts=None, prompt_embeddings=np.zeros((3, 10, 48))), "(3, 10, 48)"),
        (dict(prompts=None, prompt_embeddings=np.zeros((3, 300, 48))), "prompt_mask is NoneType"),
        (
            dict(
                prompts=None,
                prompt_embeddings=np.zeros((3, 300, 48)),
                prompt_mask=np.ones((2, 300), bool),
            ),
            "prompt_mask is (2, 300)",
        ),
        (
            dict(
                prompts=None,
                prompt_embeddings=np.zeros((3, 300, 48)),
                prompt_mask=np.full((3, 300), 2),
            ),
            "prompt_mask has other values than 0 and 1",
        ),
        (dict(sampler="ddim"), "sampler 'ddim'"),
        (dict(unconditional_mask="none"), "unconditional_mask 'none' is not one of negative, pr"),
        (dict(unconditional_mask=True), "unconditional_mask True"),
        (dict(output="jpg"), "output 'jpg'"),
        (dict(output="device"), "output 'device' is not one of pil, np, float, latent"),
        (dict(flow_shift=0.0), "flow_shift 0.0"),
        (dict(negative_prompt=["a", "b"]), "2 negative prompts for 3 prompts"),
        (dict(guidance_scale=[1.0, 2.0]), "3 of them, one a prompt"),
        (dict(latents=np.zeros((3, 4, 4, 5), np.float32)), "latents is (3, 4, 4, 5)"),
    ],
)
def test_bad_arguments_are_refused(ours, change, words):  # noqa: F811
    prompts = {"prompts": PROMPTS, **change}
    with pytest.raises(UserError) as error:
        draw(ours, **prompts)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_no_prompt_is_refused(ours):  # noqa: F811
    for prompts in (None, []):
        with pytest.raises(UserError):
            draw(ours, prompts)


EMBEDDINGS, MASK = np.zeros((1, 300, 48), np.float32), np.ones((1, 300), bool)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda p: p.decode(np.zeros((1, 4, 4, 5), np.float32)), "latents is (1, 4, 4, 5)"),
        (lambda p: p.decode(np.zeros((4, 4, 8), np.float32)), "latents is (4, 4, 8)"),
        (lambda p: p.decode([1]), "latents is list"),
        (lambda p: p.decode(np.zeros((1, 4, 4, 8), np.float32), tile=64), "tile 64"),
        (lambda p: p.decode(np.zeros((1, 4, 4, 8), np.float32), tile=(64,)), "tile (64,)"),
        (lambda p: p.encode(np.zeros((1, 64, 64, 3), np.uint8)), "images holds uint8"),
        (lambda p: p.encode(torch.zeros(1, 64, 64, 3)), "images holds torch.float32"),
        (lambda p: p.encode(np.zeros((1, 64, 64, 1), np.float32)), "images is (1, 64, 64, 1)"),
        (lambda p: p.encode(np.zeros((1, 60, 64, 3), np.float32)), "height 60"),
        (lambda p: p.encode(np.zeros((1, 64, 60, 3), np.float32), tile=(64, 32)), "width 60"),
        (
            lambda p: p.velocity(np.zeros((2, 4, 4, 8), np.float32), 5.0, EMBEDDINGS, MASK),
            "embeddings is (1, 300, 48)",
        ),
        (
            lambda p: p.velocity(np.zeros((1, 4, 4, 8), np.float32), np.ones(3), EMBEDDINGS, MASK),
            "timestep is (3,)",
        ),
        (
            lambda p: p.velocity(np.zeros((1, 4, 4, 8), np.float32), 5.0, EMBEDDINGS, MASK * 1.0),
            "mask holds float64",
        ),
        (lambda p: p.save_pretrained("gs://bucket/x"), "gs:"),
        (lambda p: p.save_pretrained(__file__), "not an empty folder"),
        (lambda p: p.save_pretrained("x", format="onnx"), "format 'onnx'"),
        (lambda p: SanaPipeline.from_pretrained(5), "not by 5"),
        (lambda p: SanaPipeline.from_pretrained("gs://bucket/x"), "gs://bucket/x"),
        (lambda p: SanaPipeline.from_pretrained("shapez"), "no checkpoint 'shapez'"),
        (lambda p: SanaPipeline.from_pretrained("x", mesh=5), "mesh 5"),
        (lambda p: SanaPipeline.from_pretrained("x", dtype="int8"), "dtype 'int8'"),
        (lambda p: SanaPipeline.from_pretrained("/", revision="v1"), "no revision 'v1'"),
    ],
)
def test_other_bad_calls_are_refused(ours, call, words):  # noqa: F811
    with pytest.raises(UserError) as error:
        call(ours)
    assert words in str(error.value)


FACTS = Facts(32, 1, 1024, 8, 300, 48, 3.0)


def test_a_request_and_a_call_have_the_same_defaults():
    call, of = (dict(inspect.signature(f).parameters) for f in (SanaPipeline.__call__, Request.of))
    for own in "self", "on_step", "output":
        del call[own]
    del of["facts"]
    assert call.keys() == of.keys()
    assert all(call[name].default == of[name].default for name in call)


def test_nothing_is_left_to_a_default():
    found = Request.of(FACTS, "a cat")
    assert (found.height, found.width, found.crop, found.tile) == (1024, 1024, None, None)
    assert (found.prompts, found.negative_prompts, found.count) == (["a cat"], [""], 1)
    assert found.steps.flow_shift == 3.0 and found.seeds.tolist() == [0] and found.guided


@pytest.mark.parametrize("of", [np.asarray, jnp.asarray, lambda x: np.asarray(x)[()]])
def test_scalars_and_lists_of_numpy_and_jax_are_those_of_python(of):
    arguments = dict(
        height=832,
        width=1216,
        num_steps=3,
        guidance_scale=2.5,
        guidance_interval=[0.25, 0.5],
        num_images_per_prompt=2,
        seed=7,
        flow_shift=1.5,
        use_resolution_binning=True,
        sequential_guidance=False,
        tile=[64, 32],
    )
    expected = Request.of(FACTS, ["a", "b"], **arguments)
    found = Request.of(FACTS, ["a", "b"], **{name: of(x) for name, x in arguments.items()})
    for field in dataclasses.fields(Request):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert type(one) is type(other), field.name
        np.testing.assert_array_equal(one, other, field.name)
    several = dict(guidance_scale=[1.5, 2.5], seed=[3, 2**31 - 1])
    found = Request.of(FACTS, np.array(["a", "b"]), **{name: of(x) for name, x in several.items()})
    assert found.prompts == ["a", "b"] and found.seeds.tolist() == [3, 2**31 - 1]
    assert [type(prompt) for prompt in found.prompts] == [str, str]
    assert found.scale.tolist() == [1.5, 2.5]


@pytest.mark.parametrize("kind", [bool, np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("of", [np.asarray, jnp.asarray])
def test_masks_may_be_of_whole_numbers(of, kind):
    mask = np.arange(300)[None] < 5
    found = Request.of(FACTS, prompt_embeddings=EMBEDDINGS, prompt_mask=of(mask.astype(kind)))
    assert found.mask.dtype == np.bool_ and np.array_equal(found.mask, mask)


def test_seeds_of_64_bits_count_up_over_the_words_of_a_key():
    found = Request.of(FACTS, "a", seed=2**32 - 1, num_images_per_prompt=2)
    assert found.seeds.tolist() == [2**32 - 1, 2**32]
    assert found.keys.tolist() == [[0, 2**32 - 1], [1, 0]]
    assert Request.of(FACTS, "a", seed=2**64 - 1).keys.tolist() == [[2**32 - 1] * 2]


def test_binning_samples_a_published_size_and_crops():
    found = Request.of(FACTS, "a", height=1000, width=1500, use_resolution_binning=True)
    assert (found.height, found.width, found.crop) == (832, 1216, (1000, 1500))
    exact = Request.of(FACTS, "a", height=832, width=1216, use_resolution_binning=True)
    assert (exact.height, exact.width, exact.crop) == (832, 1216, None)


def test_tiles_are_of_the_size_that_is_sampled():
    large = dict(height=2048, width=2080)
    assert Request.of(FACTS, "a", **large).tile == request.LARGE_TILE
    assert Request.of(FACTS, "a", **large, tile=None).tile is None
    assert Request.of(FACTS, "a", **large, use_resolution_binning=True).tile is None
