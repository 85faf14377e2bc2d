"""Sana-Sprint from a diffusers folder and a prompt to pixels, against diffusers in float32."""

import numpy as np
import pytest
import torch
from diffusers import SanaSprintImg2ImgPipeline, SCMScheduler
from diffusers.schedulers import scheduling_scm
from PIL import Image

from sana_jax import SanaPipeline
from sana_jax.checkpoints.peft import write_adapter
from sana_jax.diffusion import scm
from sana_jax.sharding import make_mesh
from tests import toy
from tests.models.test_dit import reference as velocity_of_diffusers
from tests.pipeline.test_image_input import picture
from tests.pipeline.test_pipeline import HEIGHT, PROMPTS, WIDTH, assert_same_pictures

SIZE = dict(height=HEIGHT, width=WIDTH)
# Ours, and what diffusers takes for it.
SCHEDULES = {
    "1 step": dict(num_steps=1),
    "2 steps": dict(num_steps=2),
    "4 steps": dict(num_steps=4),
    "4 steps of diffusers": dict(num_steps=4, angles="diffusers"),
    "angles": dict(angles=[1.5, 0.9, 0.4, 0.0]),
}


@pytest.fixture(scope="module")
def theirs():
    pipe = toy.sprint_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    mesh = make_mesh(devices=toy.devices(1))
    return SanaPipeline.from_pretrained(str(folder), dtype="float32", mesh=mesh)


def noise(steps: int, count: int = len(PROMPTS)) -> np.ndarray:
    """The noise of every step, (count, steps, h, w, c)."""
    shape = (count, steps, HEIGHT // 32, WIDTH // 32, 8)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def angles_of(settings: dict) -> list[float]:
    angles = settings.get("angles")
    if isinstance(angles, list):
        return angles
    return list(scm.named_angles(angles, settings["num_steps"]))


@torch.no_grad()
def reference(monkeypatch, theirs, prompts, noises, angles, output_type="latent", **kwargs):
    """diffusers' latents, channels last, or uint8 pictures, with the noise handed in."""
    drawn = [torch.tensor(z).permute(0, 3, 1, 2) for z in noises.swapaxes(0, 1)]
    left = iter([*drawn[1:], drawn[0]])  # it draws at the last step too, and adds none of that
    monkeypatch.setattr(scheduling_scm, "randn_tensor", lambda shape, **_: next(left))
    if "image" not in kwargs:
        kwargs["latents"] = drawn[0]
    else:
        module = SanaSprintImg2ImgPipeline.prepare_latents.__globals__
        monkeypatch.setitem(module, "randn_tensor", lambda shape, **_: drawn[0])
    scheduler = SCMScheduler()
    if angles is not None:
        toy.set_angles(scheduler, angles)
        kwargs |= dict(num_inference_steps=len(angles) - 1, intermediate_timesteps=None)
    monkeypatch.setattr(theirs, "scheduler", scheduler)
    options = dict(use_resolution_binning=False, output_type=output_type)
    out = theirs(prompts, **options, **SIZE, **kwargs).images
    if output_type == "latent":
        return out.permute(0, 2, 3, 1).numpy()
    return np.stack([np.asarray(image) for image in out])


@pytest.mark.parametrize("name", SCHEDULES)
def test_latents_are_those_of_diffusers(theirs, ours, monkeypatch, name):
    settings = SCHEDULES[name]
    angles = angles_of(settings)
    noises = noise(len(angles) - 1)
    found = ours(PROMPTS, latents=noises, output="latent", **SIZE, **settings)
    expected = reference(monkeypatch, theirs, PROMPTS, noises, angles)
    toy.assert_close(found, expected, 1e-4, name)


@pytest.mark.parametrize("steps", [2, 4])
def test_the_schedule_called_diffusers_is_its_default(theirs, ours, monkeypatch, steps):
    noises = noise(steps)
    found = ours(
        PROMPTS, latents=noises, output="latent", num_steps=steps, angles="diffusers", **SIZE
    )
    given = {} if steps == 2 else dict(num_inference_steps=steps, intermediate_timesteps=None)
    expected = reference(monkeypatch, theirs, PROMPTS, noises, None, **given)
    toy.assert_close(found, expected, 1e-4, f"{steps} steps")


def test_pictures_are_those_of_diffusers(theirs, ours, monkeypatch):
    noises = noise(2)
    found = ours(PROMPTS, latents=noises, guidance_scale=3.0, **SIZE)
    found = np.stack([np.asarray(image) for image in found])
    angles = list(scm.PAPER[2])
    given = dict(output_type="pil", guidance_scale=3.0)
    expected = reference(monkeypatch, theirs, PROMPTS, noises, angles, **given)
    assert_same_pictures(found, expected)


@pytest.mark.parametrize("steps, strength", [(2, 0.5), (4, 0.6), (4, 0.25), (7, 0.8)])
def test_from_a_picture_as_diffusers(theirs, ours, monkeypatch, steps, strength):
    given = [picture(HEIGHT, WIDTH, seed) for seed in range(len(PROMPTS))]
    angles = list(scm.named_angles(None, steps))
    run = steps - int(max(steps - min(steps * strength, steps), 0))
    noises = noise(run)
    arguments = dict(latents=noises, num_steps=steps, image=given, strength=strength)
    img2img = SanaSprintImg2ImgPipeline(**theirs.components)
    img2img.set_progress_bar_config(disable=True)
    start = dict(image=[Image.fromarray(x) for x in given], strength=strength)
    for output, kind in (("latent", "latent"), ("np", "pil")):
        found = ours(PROMPTS, output=output, **arguments)
        expected = reference(monkeypatch, img2img, PROMPTS, noises, angles, kind, **start)
        if output == "latent":
            toy.assert_close(found, expected, 1e-4, f"{steps} steps, strength {strength}")
        else:
            assert_same_pictures(found, expected)


SMALL = dict(height=128, width=128, num_steps=4, seed=5)


def draw(pipe, prompts=PROMPTS, **kwargs):
    return pipe(prompts, **{**SMALL, "output": "np", **kwargs})


def test_a_seed_gives_one_picture_at_any_batch_size_and_position(ours, folder):
    """Also where each of its steps adds noise; on other devices it moves a grey level at most."""
    expected = draw(ours)
    np.testing.assert_array_equal(draw(ours), expected)
    assert (draw(ours, seed=6) != expected).any()

    def check(found, rows):
        assert np.abs(found.astype(int) - expected[rows].astype(int)).max() <= 1

    check(draw(ours, PROMPTS[1], seed=6), [1])
    check(draw(ours, PROMPTS[::-1], seed=[7, 6, 5]), [2, 1, 0])
    check(draw(ours, PROMPTS[2], seed=[6, 7], num_images_per_prompt=2)[1:], [2])
    mesh = make_mesh(devices=toy.devices(2))
    check(draw(SanaPipeline.from_pretrained(str(folder), dtype="float32", mesh=mesh)), [0, 1, 2])


def test_the_guidance_scale_of_each_prompt_is_an_input(ours):
    found = draw(ours, guidance_scale=[4.5, 1.0, 7.0], output="latent")
    for i, scale in enumerate([4.5, 1.0, 7.0]):
        alone = draw(ours, PROMPTS[i], guidance_scale=scale, seed=5 + i, output="latent")
        toy.assert_close(alone[0], found[i], 1e-5)
    toy.assert_close(draw(ours, output="latent")[0], found[0], 1e-6)
    assert toy.relative_error(draw(ours, output="latent")[1], found[1]) > 1e-3


def test_two_steps_are_the_default_and_on_step_sees_them(ours):
    seen, given = [], dict(num_steps=None, output="latent")
    found = draw(ours, on_step=lambda i, x: seen.append((i, np.asarray(x))), **given)
    assert [i for i, _ in seen] == [0, 1]
    np.testing.assert_array_equal(seen[-1][1], found)
    toy.assert_close(
        found, draw(ours, output="latent", angles=list(scm.PAPER[2]), num_steps=2), 1e-6
    )


def test_the_start_may_be_handed_in_and_the_rest_of_the_seed(ours):
    start = noise(1)[:, 0, :4, :4]
    one, same, other = (draw(ours, latents=start, seed=seed, output="latent") for seed in (5, 5, 8))
    np.testing.assert_array_equal(one, same)
    assert toy.relative_error(other, one) > 1e-3


def test_pixels_outside_a_mask_are_the_picture_s(ours):
    given = picture(128, 128)
    mask = np.zeros((128, 128), np.uint8)
    mask[:, 64:] = 255
    for strength in (0.5, 1.0):
        (found,) = ours("a cat", image=given, mask=mask, strength=strength, output="np")
        np.testing.assert_array_equal(found[mask == 0], given[mask == 0])
        assert (found[mask > 0] != given[mask > 0]).any(axis=-1).mean() > 0.9


def test_angles_decide_where_a_picture_begins(ours):
    """At strength 1 the whole list is run: less of the picture is left at a larger angle."""
    given = picture(128, 128)
    data = ours.encode(given[None] / np.float32(127.5) - 1)
    far = [
        float(np.linalg.norm(ours("a", image=given, strength=1, angles=a, output="latent") - data))
        for a in ([0.1, 0], [1.4, 0])
    ]
    assert far[0] < far[1] / 1.5
    size = dict(height=128, width=128)
    np.testing.assert_array_equal(
        ours("a", image=given, strength=1, output="np"), ours("a", output="np", **size)
    )


def test_one_evaluation_of_the_network(theirs, ours):
    rows, mask = ours.encode_prompt(PROMPTS)
    latents = noise(1)[:, 0]
    for guidance in ({}, dict(guidance_scale=2.0)):
        found = ours.velocity(latents, 0.6, rows, mask, **guidance)
        scale = 0.1 * np.full(3, guidance.get("guidance_scale", 4.5), np.float32)
        given = latents, 0.6, np.asarray(rows), np.asarray(mask)
        toy.assert_close(found, velocity_of_diffusers(theirs.transformer, *given, scale), 1e-5)


def test_loras_are_of_sprint_too(ours, tmp_path):
    """A LoRA may change the embedding of guidance, which no other model has."""
    before = draw(ours)
    rng = np.random.default_rng(0)
    sites = {
        name: {
            "a": rng.standard_normal((64, 2)).astype(np.float32),
            "b": rng.standard_normal((2, 64)).astype(np.float32),
        }
        for name in ("guidance_linear_2",)
    }
    write_adapter(tmp_path / "lora.safetensors", {"time_embed": sites}, ours.checkpoint.dit)
    ours.load_lora(str(tmp_path / "lora.safetensors"), 0.1)
    assert (draw(ours) != before).any()
    ours.unload_lora()
    np.testing.assert_array_equal(draw(ours), before)


def test_saving_and_loading_changes_nothing(ours, tmp_path):
    for layout in "native", "diffusers":
        ours.save_pretrained(tmp_path / layout, format=layout)
        again = SanaPipeline.from_pretrained(
            str(tmp_path / layout), dtype="float32", mesh=make_mesh(devices=toy.devices(1))
        )
        np.testing.assert_array_equal(draw(again), draw(ours))
