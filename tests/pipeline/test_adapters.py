"""LoRAs of a pipeline, against those of diffusers' pipeline."""

import jax
import numpy as np
import pytest

from sana_jax import SanaPipeline, sharding
from sana_jax.checkpoints.peft import write_adapter
from sana_jax.lora.adapter import merge, with_text_encoder
from sana_jax.runtime.errors import UserError
from tests import toy
from tests.checkpoints.test_peft import random_adapter
from tests.pipeline.test_pipeline import PROMPTS, noise, one_device, reference

STEPS = dict(num_steps=3, guidance_scale=3.0)


@pytest.fixture(scope="module")
def theirs():
    return toy.pipeline()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return SanaPipeline.from_pretrained(str(folder), dtype="float32", mesh=one_device())


@pytest.fixture
def pipe(ours):
    yield ours
    ours.unload_lora()


@pytest.fixture(scope="module")
def files(ours, tmp_path_factory):
    """A LoRA of everything, and one of the attention, with an alpha of its own."""
    path, config = tmp_path_factory.mktemp("loras"), ours.checkpoint.dit
    (path / "one").mkdir()
    one = path / "one" / "pytorch_lora_weights.safetensors"
    write_adapter(one, random_adapter(config), config)
    other = path / "other.safetensors"
    targets = ("blocks/(cross_)?attention/.*",)
    write_adapter(other, random_adapter(config, targets, rank=2, seed=7), config, alpha=3)
    return str(path / "one"), str(other)


def latents(pipe):
    return pipe(PROMPTS[:2], latents=noise(2), height=128, width=192, output="latent", **STEPS)


def latents_of(theirs):
    steps = dict(num_inference_steps=3, guidance_scale=3.0, negative_prompt="")
    return reference(theirs, PROMPTS[:2], noise(2), **steps)


def test_latents_are_those_of_diffusers(theirs, pipe, files):
    theirs.load_lora_weights(files[0], adapter_name="one")
    theirs.load_lora_weights(files[1], adapter_name="other")
    try:
        for weights in [1.0], [0.6, -0.8]:
            theirs.set_adapters(["one", "other"][: len(weights)], weights)
            for name, weight in zip(files, weights, strict=False):
                pipe.load_lora(name, weight)
            toy.assert_close(latents(pipe), latents_of(theirs), 1e-4)
    finally:
        theirs.unload_lora_weights()


def test_what_is_unloaded_leaves_no_trace(pipe, files):
    base, before = pipe.params["dit"], np.asarray(latents(pipe))
    pipe.load_lora(files[0], 0.5)
    changed = np.asarray(latents(pipe))
    assert not np.allclose(changed, before, atol=1e-2)
    pipe.load_lora(files[1])
    pipe.unload_lora(files[1])
    assert np.array_equal(latents(pipe), changed)
    pipe.unload_lora()
    assert np.array_equal(latents(pipe), before)
    kept = jax.tree.leaves(pipe.params["dit"])
    assert all(new is old for new, old in zip(kept, jax.tree.leaves(base), strict=True))


def test_a_lora_of_the_text_encoder_changes_what_is_remembered_too(ours, pipe, tmp_path):
    """The rows of an instruction and of negative prompts, which were read without it."""
    checkpoint, steps = ours.checkpoint, dict(STEPS, negative_prompt="a dog")
    adapter = with_text_encoder({}, random_adapter(checkpoint.text_encoder))
    file = tmp_path / "lora.safetensors"
    write_adapter(file, adapter, checkpoint.dit, text_encoder=checkpoint.text_encoder)

    def draw(pipe):
        given = dict(latents=noise(1), height=128, width=192, instruction="Draw: ", **steps)
        return np.asarray(pipe(PROMPTS[:1], output="latent", **given))

    before = draw(pipe)
    pipe.load_lora(str(file))
    changed = draw(pipe)
    fresh = SanaPipeline(ours.checkpoint, one_device(), "float32")
    fresh.load_lora(str(file))
    assert np.array_equal(changed, draw(fresh)) and not np.allclose(changed, before, atol=1e-2)
    pipe.unload_lora()
    assert np.array_equal(draw(pipe), before)


def test_the_same_name_replaces(pipe, files):
    pipe.load_lora(files[1], 0.5)
    once = np.asarray(latents(pipe))
    pipe.load_lora(files[1], 2.0)
    pipe.load_lora(files[1], 0.5)
    assert np.array_equal(latents(pipe), once) and list(pipe.loras) == [files[1]]


def test_merged_equals_unmerged(pipe, files):
    pipe.load_lora(files[0], 0.7)
    before, attached = np.asarray(latents(pipe)), pipe.params
    try:
        pipe.params = {**attached, "dit": merge(attached["dit"])}
        toy.assert_close(latents(pipe), before, 1e-5)
    finally:
        pipe.params = attached


def test_updates_lie_where_their_kernels_do(folder, pipe, files):
    mesh = sharding.make_mesh(fsdp=2, tensor=2, replica=1, devices=toy.devices(4))
    other = SanaPipeline.from_pretrained(str(folder), dtype="float32", mesh=mesh)
    for each in pipe, other:
        each.load_lora(files[0], 0.7)
    for layer in other.params["dit"]["blocks"]["attention"].values():
        kernel, lora = layer["kernel"].sharding.spec, layer["lora"]
        assert tuple(lora["a"].sharding.spec)[1] == kernel[1]
        assert tuple(lora["b"].sharding.spec)[2] == kernel[2]
    toy.assert_close(latents(other), latents(pipe), 1e-5)


def test_a_pipeline_with_loras_is_not_saved(pipe, files, tmp_path):
    pipe.load_lora(files[0])
    with pytest.raises(UserError, match="would not be saved: call unload_lora"):
        pipe.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lora_that_cannot_be_loaded_changes_nothing(pipe, files, tmp_path):
    pipe.load_lora(files[1])
    params = pipe.params
    wrong = [(tmp_path / "none.safetensors", 1.0), (files[0], "much"), (files[0], float("nan"))]
    for name, weight in [*wrong, (3, 1.0), ("", 1.0)]:
        with pytest.raises(UserError):
            pipe.load_lora(name, weight)
    with pytest.raises(UserError, match="no LoRA 'other' is loaded, but"):
        pipe.unload_lora("other")
    assert pipe.params is params and list(pipe.loras) == [files[1]]
