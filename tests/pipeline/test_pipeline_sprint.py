"""Sana-Sprint from a diffusers folder and a prompt to pixels, against diffusers in float32."""

import numpy as np
import pytest
import torch
from diffusers import SanaSprintImg2ImgPipeline
from diffusers.schedulers import scheduling_scm
from PIL import Image

from sana_jax import SanaPipeline
from sana_jax.diffusion import scm
from sana_jax.sharding import make_mesh
from tests import toy
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
    steps = dict(timesteps=angles, max_timesteps=None, intermediate_timesteps=None)
    out = theirs(
        prompts,
        num_inference_steps=len(angles) - 1,
        use_resolution_binning=False,
        output_type=output_type,
        **{**SIZE, **steps, **kwargs},
    ).images
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
    own = {} if steps == 2 else dict(intermediate_timesteps=None)
    given = dict(timesteps=None, max_timesteps=1.5708, intermediate_timesteps=1.3) | own
    placeholder = [0.0] * (steps + 1)
    expected = reference(monkeypatch, theirs, PROMPTS, noises, placeholder, **given)
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
