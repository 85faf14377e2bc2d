"""The whole way from a diffusers folder and a prompt to pixels, against diffusers in float32."""

import functools
import tempfile

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from sana_jax import SanaPipeline
from sana_jax.diffusion.dpm_solver import flow_dpm_solver
from sana_jax.pipeline import denoise, pipeline, programs, request
from sana_jax.runtime.errors import Retry, UserError
from sana_jax.sharding import make_mesh
from tests import toy

# Of very different lengths; upper case, white space and the empty prompt are part of the contract.
PROMPTS = [
    "A red circle",
    "  a small Blue square above a large green triangle, between two dark lines on a gray sky ",
    "",
]
NEGATIVE = "a dark photo of a car"
HEIGHT, WIDTH = 128, 192


@pytest.fixture(scope="module")
def theirs():
    return toy.pipeline()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return SanaPipeline.from_pretrained(str(folder), dtype="float32", mesh=one_device())


def one_device():
    return make_mesh(devices=toy.devices(1))


def noise(count: int, seed: int = 0) -> np.ndarray:
    shape = (count, HEIGHT // 32, WIDTH // 32, 8)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@torch.no_grad()
def reference(theirs, prompts, latents, output_type="latent", **kwargs):
    size = dict(height=HEIGHT, width=WIDTH, use_resolution_binning=False)
    kwargs = {"negative_prompt": NEGATIVE, **size, **kwargs}
    theirs.set_progress_bar_config(disable=True)
    start = torch.tensor(latents).permute(0, 3, 1, 2)
    out = theirs(prompts, latents=start, output_type=output_type, **kwargs).images
    if output_type == "latent":
        return out.permute(0, 2, 3, 1).numpy()
    return np.stack([np.asarray(image) for image in out])


SETTINGS = {
    "14 steps": dict(num_steps=14),
    "20 steps": dict(num_steps=20),
    "20 steps, no guidance": dict(num_steps=20, guidance_scale=1.0),
    "20 steps, no instruction": dict(num_steps=20, instruction=None),
    "Euler": dict(num_steps=14, sampler="flow_euler"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_latents_are_those_of_diffusers(theirs, ours, name):
    settings = SETTINGS[name]
    latents = noise(len(PROMPTS))
    found = ours(
        PROMPTS,
        negative_prompt=NEGATIVE,
        height=HEIGHT,
        width=WIDTH,
        latents=latents,
        output="latent",
        **settings,
    )
    kwargs = dict(
        num_inference_steps=settings["num_steps"],
        guidance_scale=settings.get("guidance_scale", 4.5),
    )
    if "instruction" in settings:
        kwargs["complex_human_instruction"] = None
    scheduler = theirs.scheduler
    if settings.get("sampler") == "flow_euler":
        theirs.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected = reference(theirs, PROMPTS, latents, **kwargs)
    theirs.scheduler = scheduler
    toy.assert_close(found, expected, 1e-4, name)


@torch.no_grad()
@pytest.mark.parametrize("negative", ["", NEGATIVE])
def test_the_prompt_s_mask_over_the_negative_prompt_is_that_of_nvlabs(theirs, ours, negative):
    """Restated by diffusers' pipeline, which takes embeddings and masks of other makers.

    NVlabs' scripts/inference.py: the negative prompt is padded to all rows, Gemma is given its
    mask, and the transformer sees its rows through the mask of each prompt.
    """
    prompts, latents = PROMPTS[:2], noise(2)
    rows = ours.checkpoint.text_rows
    padded = theirs.tokenizer(
        negative, padding="max_length", max_length=rows, truncation=True, return_tensors="pt"
    )
    unconditional = theirs.text_encoder(padded.input_ids, attention_mask=padded.attention_mask)[0]
    embeddings, mask = ours.encode_prompt(prompts)
    mask = torch.tensor(np.asarray(mask, np.int64))
    expected = reference(
        theirs,
        None,
        latents,
        num_inference_steps=4,
        negative_prompt=None,
        prompt_embeds=torch.tensor(np.asarray(embeddings)),
        prompt_attention_mask=mask,
        negative_prompt_embeds=unconditional.expand(2, -1, -1),
        negative_prompt_attention_mask=mask,
    )
    settings = dict(height=HEIGHT, width=WIDTH, latents=latents, num_steps=4, output="latent")
    settings |= dict(negative_prompt=negative)
    found = ours(prompts, unconditional_mask="prompt", **settings)
    toy.assert_close(found, expected, 1e-4, "the prompt's mask")
    assert toy.relative_error(ours(prompts, **settings), expected) > 1e-2
    np.testing.assert_array_equal(
        ours(prompts, unconditional_mask="negative", **settings), ours(prompts, **settings)
    )


def assert_same_pictures(found: np.ndarray, expected: np.ndarray):
    """At most one value in a thousand off, none by more than one grey level."""
    assert found.shape == expected.shape and found.dtype == np.uint8
    inside = np.mean((expected >= 1) & (expected <= 254))
    assert inside >= 0.8, f"only {inside:.0%} of the values can tell a difference"
    off = np.abs(found.astype(int) - expected)
    print(f"{np.mean(off > 0):.4%} of the 8-bit values differ, by {off.max()} at most")
    assert off.max() <= 1 and np.mean(off > 0) <= 1e-3, (off.max(), np.mean(off > 0))


def test_pictures_are_those_of_diffusers(theirs, ours):
    latents = noise(len(PROMPTS))
    size = dict(height=HEIGHT, width=WIDTH, latents=latents, negative_prompt=NEGATIVE)
    found = ours(PROMPTS, num_steps=20, **size)
    assert all(isinstance(image, Image.Image) for image in found)
    found = np.stack([np.asarray(image) for image in found])
    expected = reference(theirs, PROMPTS, latents, "pil", num_inference_steps=20)
    assert_same_pictures(found, expected)


def test_resolution_binning(folder):
    """Sampled at the nearest published size, resized and cropped to the asked one."""
    theirs = toy.pipeline(sample_size=16)  # binning knows the published sizes only
    pipe = SanaPipeline.from_pretrained(str(folder), dtype="float32", mesh=one_device())
    ours = toy.replace_config(pipe, sample_size=16)
    bucket = (448, 576)
    shape = (1, bucket[0] // 32, bucket[1] // 32, 8)
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    size = dict(height=500, width=650, use_resolution_binning=True)
    found = ours("a red circle", num_steps=2, latents=latents, output="np", **size)
    expected = reference(
        theirs, "a red circle", latents, "pil", num_inference_steps=2, negative_prompt="", **size
    )
    assert found.shape == (1, 500, 650, 3)
    assert_same_pictures(found, expected)


SMALL = dict(height=128, width=128, num_steps=4, seed=5)


def draw(pipe, prompts=PROMPTS, **kwargs):
    """`prompts` may be None."""
    return pipe(prompts, **{**SMALL, "output": "np", **kwargs})


def test_same_seed_same_bits(ours):
    np.testing.assert_array_equal(draw(ours), draw(ours))
    assert (draw(ours) != draw(ours, seed=6)).any()


def test_batch_position_and_devices_change_one_grey_level_at_most(ours, folder):
    expected = draw(ours)

    def check(found, rows):
        difference = np.abs(found.astype(int) - expected[rows].astype(int))
        assert difference.max() <= 1

    check(draw(ours, PROMPTS[1], seed=6), [1])  # alone; in the batch its seed is 5 + 1
    check(draw(ours, PROMPTS[::-1], seed=[7, 6, 5]), [2, 1, 0])
    for count in (2, 8):
        mesh = make_mesh(devices=toy.devices(count))
        pipe = SanaPipeline.from_pretrained(str(folder), dtype="float32", mesh=mesh)
        check(draw(pipe), [0, 1, 2])
        np.testing.assert_array_equal(draw(pipe), draw(pipe))


def test_weights_sharded_over_the_mesh(ours, folder):
    mesh = make_mesh(replica=1, fsdp=2, tensor=2, devices=toy.devices(4))
    pipe = SanaPipeline.from_pretrained(str(folder), dtype="float32", mesh=mesh)
    kernel = pipe.params["dit"]["blocks"]["ffn"]["expand"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    assert np.abs(draw(pipe).astype(int) - draw(ours)).max() <= 1


def test_several_images_of_several_prompts_are_those_of_single_calls(ours):
    """They stand in a row and count up from the seed; each keeps the mask of its prompt.

    diffusers 0.42 repeats masks in another order than embeddings, which would show.
    """
    pictures = draw(ours, PROMPTS[:2], num_images_per_prompt=2, seed=10).astype(int)
    for i, picture in enumerate(pictures):
        alone = draw(ours, PROMPTS[i // 2], seed=10 + i)
        assert np.abs(picture - alone[0]).max() <= 1
    rows, mask = ours.encode_prompt([PROMPTS[i // 2] for i in range(4)])
    theirs = dict(prompt_embeddings=rows, prompt_mask=np.asarray(mask)[[0, 2, 0, 2]])
    assert np.abs(pictures - draw(ours, None, **theirs, seed=10)).max() > 1


def test_guidance_interval(ours):
    """All of sigma is plain guidance; none of it is no guidance."""
    everywhere = draw(ours, guidance_interval=(-1.0, 2.0), output="latent")
    toy.assert_close(everywhere, draw(ours, output="latent"), 1e-5)
    nowhere = draw(ours, guidance_interval=(2.0, 3.0), output="latent")
    toy.assert_close(nowhere, draw(ours, guidance_scale=1.0, output="latent"), 1e-5)
    middle = draw(ours, guidance_interval=(0.2, 0.9), output="latent")
    assert toy.relative_error(middle, everywhere) > 1e-3 < toy.relative_error(middle, nowhere)


def test_guidance_of_each_prompt(ours):
    found = draw(ours, guidance_scale=[4.5, 1.0, 2.0], negative_prompt="a dog")
    for i, scale in enumerate([4.5, 1.0, 2.0]):
        alone = draw(ours, PROMPTS[i], guidance_scale=scale, seed=5 + i, negative_prompt="a dog")
        assert np.abs(found[i].astype(int) - alone[0]).max() <= 1


def test_on_step_sees_every_step(ours):
    seen = []
    found = draw(ours, on_step=lambda i, x: seen.append((i, np.asarray(x))), output="latent")
    assert [i for i, _ in seen] == [0, 1, 2, 3]
    np.testing.assert_array_equal(seen[-1][1], found)
    toy.assert_close(found, draw(ours, output="latent"), 1e-5)


def test_prompt_embeddings_in_place_of_prompts(ours):
    embeddings, mask = ours.encode_prompt(PROMPTS)
    assert embeddings.shape == (3, 300, 48) and embeddings.dtype == np.float32
    assert not np.asarray(embeddings)[~np.asarray(mask)].any()
    # Also where another pipeline made them, on another device.
    embeddings, mask = jax.device_put((embeddings, mask), jax.devices()[-1])
    found = draw(ours, None, prompt_embeddings=embeddings, prompt_mask=mask)
    np.testing.assert_array_equal(found, draw(ours))


@pytest.fixture
def calls(monkeypatch):
    """The runs of the text encoder: how many tokens, after how many of an instruction."""
    seen, read, encode = [], programs.read_prefix, programs.encode_text

    def count_read(module, params, tokens):
        seen.append(("read", tokens.shape[1]))
        return read(module, params, tokens)

    def count_encode(module, params, tokens, prefix, *rest):
        seen.append((tokens.shape, prefix.keys.shape[2] if prefix else 0))
        return encode(module, params, tokens, prefix, *rest)

    monkeypatch.setattr(programs, "read_prefix", count_read)
    monkeypatch.setattr(programs, "encode_text", count_encode)
    return seen


@pytest.mark.parametrize("count", [1, 8])
def test_instruction_is_read_once(ours, folder, calls, count):
    mesh = make_mesh(devices=toy.devices(count))
    pipe = SanaPipeline.from_pretrained(str(folder), dtype="float32", mesh=mesh)
    first, second = "draw it well lit. prompt: ", "a photo of "
    n = [len(pipe.checkpoint.tokenizer.encode(text)) - 1 for text in (first, second)]
    rows = [pipe.encode_prompt("a cat", text)[0] for text in (first, first, second, first)]
    shape = (count, 16)
    assert calls == [("read", n[0]), (shape, n[0]), (shape, n[0])] + [
        ("read", n[1]),
        (shape, n[1]),
        (shape, n[0]),
    ]
    for again in rows[1], rows[3]:
        np.testing.assert_array_equal(again, rows[0])
    assert toy.relative_error(rows[2], rows[0]) > 1e-3
    toy.assert_close(rows[0], ours.encode_prompt("a cat", first)[0], 2e-6)


def test_few_lengths_are_compiled(ours):
    ours.encode_prompt("a", "prompt: ")
    before = programs.encode_text._cache_size(), programs.read_prefix._cache_size()
    for words in range(1, 30, 4):  # up to 16, and up to 32 tokens
        ours.encode_prompt("a" + " cat" * words, "prompt: ")
    assert programs.encode_text._cache_size() == before[0] + 1
    assert programs.read_prefix._cache_size() == before[1]


def test_negative_prompt_is_encoded_once(ours, folder, calls):
    pipe = SanaPipeline.from_pretrained(str(folder), dtype="float32", mesh=one_device())
    prompts = ["a cat", "a dog"]
    settings = dict(num_steps=1, output="latent", instruction=None)
    expected = draw(pipe, prompts, **settings)
    assert calls == [((2, 16), 0), ((1, 16), 0)]
    again = draw(pipe, prompts, negative_prompt=["", ""], **settings)
    assert len(calls) == 3 and calls[2] == calls[0]
    np.testing.assert_array_equal(again, expected)
    draw(pipe, prompts, negative_prompt=["", "a dog"], **settings)
    assert calls[3:] == [((2, 16), 0)] * 2


def test_outputs(ours):
    pixels = draw(ours, output="float")
    assert pixels.dtype == np.float32 and pixels.min() >= 0 and pixels.max() <= 1
    np.testing.assert_array_equal(np.round(np.asarray(pixels) * 255), draw(ours))
    latents = draw(ours, output="latent")
    decoded = np.clip(np.asarray(ours.decode(latents)) * 0.5 + 0.5, 0, 1)
    np.testing.assert_allclose(decoded, pixels, atol=1e-6)


def test_a_request_is_drawn_as_a_call(ours):
    asked = dict(negative_prompt="a dog", num_images_per_prompt=2, guidance_scale=[4.5, 1.0, 2.0])
    pictures, finite = ours.draw(ours.request(PROMPTS, **SMALL, **asked))
    assert isinstance(pictures, jax.Array) and finite.shape == (6,) and finite.all()
    np.testing.assert_array_equal(pictures, draw(ours, **asked))


def test_values_that_are_not_finite_are_told(ours, monkeypatch, caplog):
    decode = SanaPipeline._decode_padded
    monkeypatch.setattr(
        SanaPipeline, "_decode_padded", lambda *a: decode(*a).at[1, 0, 0].set(np.nan)
    )
    _, finite = ours.draw(ours.request(["a", "b"], **SMALL))
    assert finite.tolist() == [True, False] and not caplog.messages
    draw(ours, ["a", "b"], output="np")
    assert "1 of 2 images have NaN or infinite values: try another dtype" in caplog.text


def test_encode_and_decode_scale_the_latents(theirs, ours):
    images = np.random.default_rng(0).uniform(-1, 1, (1, 192, 128, 3)).astype(np.float32)
    with torch.no_grad():
        latents = theirs.vae.encode(torch.tensor(images).permute(0, 3, 1, 2)).latent
        expected = (latents * theirs.vae.config.scaling_factor).permute(0, 2, 3, 1).numpy()
    found = ours.encode(images)
    toy.assert_close(found, expected, 1e-5)
    with torch.no_grad():
        expected = theirs.vae.decode(latents).sample.permute(0, 2, 3, 1).numpy()
    toy.assert_close(ours.decode(found), expected, 1e-5)


def test_tiles(theirs, ours):
    latents = np.random.default_rng(0).standard_normal((1, 6, 9, 8), np.float32)
    theirs.vae.enable_tiling(128, 128, 96, 96)
    z = torch.tensor(latents).permute(0, 3, 1, 2) / theirs.vae.config.scaling_factor
    with torch.no_grad():
        expected = theirs.vae.decode(z).sample.permute(0, 2, 3, 1).numpy()
    theirs.vae.disable_tiling()
    toy.assert_close(ours.decode(latents, tile=(128, 96)), expected, 1e-5)


def test_tiles_over_a_mesh(ours, folder):
    latents = np.random.default_rng(0).standard_normal((1, 6, 9, 8), np.float32)
    mesh = make_mesh(devices=toy.devices(8))
    pipe = SanaPipeline.from_pretrained(str(folder), dtype="float32", mesh=mesh)
    found, expected = (p.decode(latents, tile=(128, 96)) for p in (pipe, ours))
    toy.assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_large_batch_is_decoded_in_groups(folder, monkeypatch, devices):
    """Here two pictures at once on a device."""
    mesh = make_mesh(devices=toy.devices(devices))
    pipe = SanaPipeline.from_pretrained(str(folder), dtype="float32", mesh=mesh)
    latents = np.random.default_rng(0).standard_normal((12, 2, 3, 8)).astype(np.float32)
    expected = pipe.decode(latents)
    programs.decode_latents.clear_cache()
    monkeypatch.setattr(programs, "LARGE", 2 * 64 * 96)
    text = programs.decode_latents.lower(
        pipe.vae, pipe.params["vae"], latents, devices=devices
    ).as_text()
    assert f"tensor<{6 // devices}x{2 * devices}x2x3x8xf32>" in text
    np.testing.assert_allclose(pipe.decode(latents), expected, atol=1e-5)
    programs.decode_latents.clear_cache()


def test_large_pictures_are_decoded_in_tiles(ours, monkeypatch):
    """By themselves above a size, here a small one; smaller ones at once."""
    monkeypatch.setattr(request, "LARGE", 128 * 128)
    monkeypatch.setattr(request, "LARGE_TILE", (128, 96))
    latents = draw(ours, "a", height=160, width=256, output="latent")
    for tile, expected in (("auto", (128, 96)), (None, None), ((64, 64), (64, 64))):
        found = draw(ours, "a", height=160, width=256, output="float", tile=tile)
        pixels = np.asarray(ours.decode(latents, tile=expected))
        np.testing.assert_allclose(found, np.clip(pixels * 0.5 + 0.5, 0, 1), atol=1e-6)
        np.testing.assert_array_equal(ours.decode(latents, tile=tile), pixels)
    small = draw(ours, "a", output="float")
    np.testing.assert_array_equal(small, draw(ours, "a", output="float", tile=None))


def test_guidance_in_sequence(ours):
    together = draw(ours, output="latent")
    toy.assert_close(draw(ours, output="latent", sequential_guidance=True), together, 1e-5)


def test_velocity_is_the_network_once(theirs, ours):
    embeddings, mask = ours.encode_prompt(PROMPTS)
    latents = noise(3)
    with torch.no_grad():
        expected = theirs.transformer(
            torch.tensor(latents).permute(0, 3, 1, 2),
            encoder_hidden_states=torch.tensor(np.asarray(embeddings)),
            encoder_attention_mask=torch.tensor(np.asarray(mask)).int(),
            timestep=torch.full((3,), 749),
        ).sample.permute(0, 2, 3, 1)
    found = ours.velocity(latents, np.full(3, 749.0), embeddings, mask)
    toy.assert_close(found, expected.numpy(), 1e-5)


def test_one_picture_over_several_devices(ours, folder):
    mesh = make_mesh(sequence=2, devices=toy.devices(2))
    pipe = SanaPipeline.from_pretrained(str(folder), dtype="float32", mesh=mesh)
    embeddings, mask = ours.encode_prompt(PROMPTS[:1])
    inputs = noise(1), np.full(1, 749.0), np.asarray(embeddings), np.asarray(mask)
    toy.assert_close(pipe.velocity(*inputs), ours.velocity(*inputs), 1e-5)
    settings = dict(output="latent", num_steps=2)
    toy.assert_close(draw(pipe, PROMPTS[:1], **settings), draw(ours, PROMPTS[:1], **settings), 1e-5)
    with pytest.raises(UserError, match="sequence=2"):
        draw(pipe, PROMPTS[:1], height=96)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types(ours, folder, dtype):
    pipe = SanaPipeline.from_pretrained(str(folder), dtype=dtype, mesh=one_device())
    assert pipe.params["dit"]["patch_embed"]["kernel"].dtype == dtype
    assert pipe.params["vae"]["decoder"]["conv_out"]["kernel"].dtype == "bfloat16"
    error = toy.relative_error(draw(pipe, output="latent"), draw(ours, output="latent"))
    assert 1e-5 < error < 0.2, error


def test_what_diffusers_users_write_is_taken(ours):
    """negative_prompt=None, numpy's numbers, a tuple of prompts."""
    numbers = dict(num_steps=np.int64(4), height=np.int32(128), seed=np.uint32(5))
    found = draw(ours, tuple(PROMPTS), negative_prompt=None, **numbers)
    np.testing.assert_array_equal(found, draw(ours))


def test_everything_that_a_checkpoint_can_change():
    """Positions, qk norms, a timestep scale, another shift: the whole way, as at 4096 px."""
    changes = dict(qk_norm="rms_norm_across_heads", interpolation_scale=2.0, timestep_scale=0.5)
    theirs = toy.pipeline(seed=3, sample_size=16, **changes)
    shifted = dict(theirs.scheduler.config, flow_shift=6.0)
    theirs.scheduler = DPMSolverMultistepScheduler.from_config(shifted)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = SanaPipeline.from_pretrained(folder, dtype="float32", mesh=one_device())
    latents = noise(len(PROMPTS))
    size = dict(height=HEIGHT, width=WIDTH, negative_prompt=NEGATIVE)
    found = ours(PROMPTS, latents=latents, num_steps=10, output="latent", **size)
    expected = reference(theirs, PROMPTS, latents, num_inference_steps=10)
    toy.assert_close(found, expected, 1e-4, "shift 6, timestep scale 0.5")
    for wrong in (dict(timestep_scale=1.0), dict(interpolation_scale=1.0)):
        other = toy.replace_config(ours, **wrong)
        found = other(PROMPTS, latents=latents, num_steps=10, output="latent", **size)
        assert toy.relative_error(found, expected) > 1e-3, wrong


def test_saving_leaves_no_copy_of_the_weights_on_the_host(folder, tmp_path):
    mesh = make_mesh(replica=1, fsdp=8)
    pipe = SanaPipeline.from_pretrained(str(folder), dtype="float32", mesh=mesh)
    pipe.save_pretrained(tmp_path / "native")
    pipe.save_pretrained(tmp_path / "diffusers", format="diffusers")
    sharded = [x for x in jax.tree.leaves(pipe.params) if not x.is_fully_replicated]
    assert sharded and all(x._npy_value is None for x in sharded)
    with pytest.raises(UserError, match="not an empty folder"):
        pipe.save_pretrained(tmp_path / "native")


def test_a_save_that_fails_leaves_nothing(ours, tmp_path, monkeypatch):
    def full(checkpoint, folder):
        (folder / "dit.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline.native, "save", full)
    with pytest.raises(Retry, match="model: No space left"):
        ours.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_save_removes_nothing_of_others(ours, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="not an empty folder"):
        ours.save_pretrained(folder)
    (folder / "mine.txt").unlink()

    def save_beside(checkpoint, path):
        (path / "model.json").write_text("half")
        ours.save_pretrained(path)  # as another process would

    monkeypatch.setattr(pipeline.native, "save", save_beside)
    with pytest.raises(UserError, match="another run"):
        ours.save_pretrained(folder)
    assert folder.exists() and not any(folder.iterdir())
    monkeypatch.undo()
    ours.save_pretrained(folder)
    assert SanaPipeline.from_pretrained(str(folder), "float32", mesh=one_device()).dit == ours.dit


def test_no_pictures_at_all(ours):
    embeddings, mask = ours.encode_prompt("a")
    with pytest.raises(UserError, match="latents is empty"):
        ours.decode(np.zeros((0, 2, 2, ours.latent_channels), np.float32))
    with pytest.raises(UserError, match="prompt_embeddings is empty"):
        ours(prompt_embeddings=embeddings[:0], prompt_mask=mask[:0])


def test_clip_attention_is_a_choice_of_the_user(folder):
    for choice in (None, True, False):
        pipe = SanaPipeline.from_pretrained(
            str(folder), dtype="float32", mesh=one_device(), clip_attention=choice
        )
        assert pipe.dit.config.clip_attention is choice


def test_one_compilation_a_shape(ours):
    """Seeds, prompts, scales, shifts and intervals are inputs; sizes and steps are shapes."""
    draw(ours, guidance_interval=(0.1, 0.9))
    draw(ours)
    before = denoise.sample._cache_size()
    draw(ours, ["a", "b", "c"], seed=9, guidance_scale=2.0, flow_shift=5.0, sampler="flow_euler")
    draw(ours, negative_prompt="a dog", guidance_interval=(0.3, 0.5))
    assert denoise.sample._cache_size() == before
    draw(ours, num_steps=5)
    assert denoise.sample._cache_size() == before + 1


def primitives(jaxpr) -> set[str]:
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found |= primitives(inner)
    return found


def test_caption_work_stays_outside_the_loop(ours):
    """The caption MLP has the network's only tanh: it is traced, but not in the scan over steps."""
    schedule = flow_dpm_solver(7, 3.0)
    captions, masks = jnp.zeros((1, 2, 300, 48)), jnp.ones((1, 2, 300), bool)
    arguments = (jnp.zeros((1, 4, 4, 8)), schedule, captions, masks, jnp.ones((1, 1, 1, 1)), None)
    trace = jax.make_jaxpr(functools.partial(denoise.sample, ours.dit, sequential=False))
    (call,) = trace(ours.params["dit"], *arguments).jaxpr.eqns
    jaxpr = call.params["jaxpr"].jaxpr
    (loop,) = (e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == 7)
    assert "tanh" in primitives(jaxpr)
    assert "tanh" not in primitives(loop.params["jaxpr"].jaxpr)
