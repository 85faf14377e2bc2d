"""Pictures as a start, and masks: against diffusers' parts, and pixel by pixel."""

import jax
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.sana import pipeline_sana
from PIL import Image

from sana_jax import SanaPipeline
from sana_jax.pipeline import image_input
from sana_jax.pipeline.image_input import ImageInput, redrawn_latents
from sana_jax.pipeline.request import Facts, Request
from sana_jax.runtime.errors import UserError
from sana_jax.sharding import make_mesh
from tests import mini, toy
from tests.pipeline.test_pipeline import (  # noqa: F401 (fixtures)
    NEGATIVE,
    PROMPTS,
    folder,
    noise,
    ours,
    theirs,
)

HEIGHT, WIDTH = 128, 192
SIDE = 32  # of mini's pictures here: eight latents


def picture(height=SIDE, width=SIDE, seed=0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return made(tmp_path_factory.mktemp("checkpoint"), 1)


def made(path, devices: int) -> SanaPipeline:
    mini.save(path)
    mesh = make_mesh(devices=toy.devices(devices))
    return SanaPipeline.from_pretrained(str(path), dtype="float32", mesh=mesh)


def draw(pipe, prompt="a cat", **arguments):
    defaults = dict(num_steps=5, guidance_scale=3.0, seed=7, output="np")
    return pipe(prompt, **defaults | arguments)


def half(height=SIDE, width=SIDE) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 2 :] = 255
    return mask


@pytest.mark.parametrize("sampler, strength", [("flow_dpm_solver", 0.6), ("flow_euler", 0.3)])
def test_latents_are_those_of_diffusers_parts(theirs, ours, monkeypatch, sampler, strength):  # noqa: F811
    """diffusers has no image to image for SANA; this is how its other pipelines make theirs."""
    count = len(PROMPTS)
    given = [picture(HEIGHT, WIDTH, seed) for seed in range(count)]
    start = noise(count)
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler = euler if sampler == "flow_euler" else theirs.scheduler
    monkeypatch.setattr(theirs, "scheduler", scheduler)

    def last_timesteps(scheduler, steps, device, *_):
        scheduler.set_timesteps(steps)
        first = int(max(steps - min(steps * strength, steps), 0))
        scheduler.set_begin_index(first)
        return scheduler.timesteps[first:], steps - first

    monkeypatch.setattr(pipeline_sana, "retrieve_timesteps", last_timesteps)
    pixels = torch.tensor(np.stack(given) / np.float32(127.5) - 1).permute(0, 3, 1, 2)
    noisy = torch.tensor(start).permute(0, 3, 1, 2)
    with torch.no_grad():
        data = theirs.vae.encode(pixels).latent * theirs.vae.config.scaling_factor
        first = last_timesteps(scheduler, 10, "cpu")[0][:1]
        if sampler == "flow_euler":
            state = scheduler.scale_noise(data, first, noisy)
        else:
            state = scheduler.add_noise(data, noisy, first)
        theirs.set_progress_bar_config(disable=True)
        expected = theirs(
            PROMPTS,
            latents=state,
            negative_prompt=NEGATIVE,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=10,
            use_resolution_binning=False,
            output_type="latent",
        ).images
    found = ours(
        PROMPTS,
        latents=start,
        negative_prompt=NEGATIVE,
        num_steps=10,
        sampler=sampler,
        image=given,
        strength=strength,
        output="latent",
    )
    toy.assert_close(found, expected.permute(0, 2, 3, 1).numpy(), 1e-4, f"{sampler} {strength}")


def test_strength_one_is_text_to_image_to_the_bit(pipe):
    size = dict(height=SIDE, width=SIDE)
    for sampler in "flow_dpm_solver", "flow_euler":
        for output in "np", "latent":
            expected = draw(pipe, sampler=sampler, output=output, **size)
            found = draw(pipe, sampler=sampler, output=output, image=picture(), strength=1)
            np.testing.assert_array_equal(found, expected)


def test_the_picture_and_the_strength_decide():
    """Steps as diffusers counts them: int(max(n - min(n s, n), 0)) are left out."""
    given = ImageInput.of(picture(), None, None, 1)
    assert given.strength == image_input.STRENGTH == 0.6
    for steps in (1, 2, 14, 20, 28, 50):
        for strength in (0.05, 0.25, 0.5, 0.6, 0.75, 1.0):
            skipped = int(max(steps - min(steps * strength, steps), 0))
            assert ImageInput.of(picture(), strength, None, 1).steps(steps) == steps - skipped
    assert ImageInput.of(picture(), 0.14, None, 1).steps(50) == 7  # 0.14 * 50 > 7 in floats
    assert ImageInput.of(picture(), 1e-12, None, 1).steps(1000) == 1


def test_less_strength_stays_nearer_to_the_picture(pipe):
    given = picture()
    data = pipe.encode(given[None] / np.float32(127.5) - 1)
    far = [
        float(np.linalg.norm(draw(pipe, image=given, strength=s, output="latent") - data))
        for s in (0.2, 0.8)
    ]
    assert far[0] < far[1] / 1.5


def test_pixels_outside_the_mask_are_the_picture_s(pipe):
    given, mask = picture(), half()
    mask[5, 3] = 255  # a single pixel: its latent is redrawn, its neighbours are not shown
    for strength in (0.2, 1.0):
        (found,) = draw(pipe, image=given, mask=mask, strength=strength)
        np.testing.assert_array_equal(found[mask == 0], given[mask == 0])
        assert (found[mask > 0] != given[mask > 0]).any(axis=-1).mean() > 0.9
    (shown,) = draw(pipe, image=given, mask=mask, output="float")
    np.testing.assert_allclose(shown[mask == 0], given[mask == 0] / 255, atol=1e-6)


def test_all_bytes_of_a_picture_come_back(pipe):
    given = np.arange(256, dtype=np.uint8).repeat(12).reshape(SIDE, SIDE, 3)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[0, 0] = True
    (found,) = draw(pipe, image=given, mask=mask, num_steps=1)
    np.testing.assert_array_equal(found[~mask], given[~mask])


def test_kept_latents_are_the_picture_s(pipe):
    given, mask = picture(), half()
    data = pipe.encode(given[None] / np.float32(127.5) - 1)
    found = draw(pipe, image=given, mask=mask, output="latent")
    kept = ~redrawn_latents(mask[None], pipe.factor)[0, ..., 0]
    assert kept.mean() == 0.5
    np.testing.assert_allclose(found[0][kept], data[0][kept], atol=1e-4)
    assert np.abs(found[0][~kept] - data[0][~kept]).max() > 0.1


def test_a_white_mask_is_the_picture_without_one(pipe):
    white = np.full((SIDE, SIDE), 255, np.uint8)
    one = draw(pipe, image=picture(), mask=white).astype(int)
    assert np.abs(one - draw(pipe, image=picture())).max() <= 1


def test_greys_blend_and_need_half_white_to_redraw(pipe):
    given, mask = picture(), half()
    mask[:, 12:16] = 51
    hard = draw(pipe, image=given, mask=half())[0].astype(float)
    soft = draw(pipe, image=given, mask=mask)[0].astype(float)
    np.testing.assert_array_equal(soft[:, :12], hard[:, :12])
    np.testing.assert_array_equal(soft[:, 16:], hard[:, 16:])
    (decoded,) = pipe.decode(draw(pipe, image=given, mask=mask, output="latent"))
    drawn = np.clip(np.asarray(decoded) * 0.5 + 0.5, -10, 10) * 255
    blended = 0.2 * drawn + 0.8 * given
    assert np.abs(soft - np.clip(blended, 0, 255))[:, 12:16].max() <= 0.51


@pytest.mark.parametrize("value, expected", [(127, False), (128, True)])
def test_a_latent_is_redrawn_if_any_of_its_pixels_is(value, expected):
    masks = np.zeros((2, 8, 12), np.uint8)
    masks[1, 4, 7] = value
    found = redrawn_latents(masks, 4)
    assert found.shape == (2, 2, 3, 1) and not found[0].any()
    assert found[1, 1, 1, 0] == expected and found[1].sum() == expected


def test_each_picture_of_a_call_is_drawn_as_alone(pipe, tmp_path):
    given, masks = [picture(seed=s) for s in range(3)], [half(), half()[:, ::-1], half().T]
    prompts, seeds = ["a", "two dogs", "three"], [3, 4, 5, 6, 7, 8]
    each = dict(strength=0.7, num_images_per_prompt=2)
    found = draw(pipe, prompts, image=given, mask=masks, seed=seeds, **each).astype(int)
    spread = made(tmp_path, 4)
    several = draw(spread, prompts, image=given, mask=masks, seed=seeds, **each).astype(int)
    assert np.abs(several - found).max() <= 1
    for i, seed in enumerate(seeds):
        one = dict(image=given[i // 2], mask=masks[i // 2], strength=0.7, seed=seed)
        assert np.abs(draw(pipe, prompts[i // 2], **one)[0] - found[i]).max() <= 1, i


def test_one_picture_and_one_mask_are_for_all_prompts(pipe):
    one = draw(pipe, ["a", "b"], image=picture(), mask=half())
    both = draw(pipe, ["a", "b"], image=[picture()] * 2, mask=[half()] * 2)
    np.testing.assert_array_equal(one, both)


def test_other_arguments_of_a_call_are_followed(pipe, monkeypatch):
    seen = []
    given = dict(image=picture(), mask=half(), strength=0.6)
    whole = draw(pipe, output="latent", **given)
    slow = draw(pipe, output="latent", on_step=lambda i, x: seen.append((i, x)), **given)
    np.testing.assert_allclose(slow, whole, atol=1e-5)
    assert [i for i, _ in seen] == [0, 1, 2]
    np.testing.assert_array_equal(seen[-1][1], slow)
    in_turn = draw(pipe, output="latent", sequential_guidance=True, **given)
    np.testing.assert_allclose(in_turn, whole, atol=1e-5)
    nowhere = draw(pipe, output="latent", guidance_interval=(0.99, 1.0), **given)
    alone = draw(pipe, output="latent", guidance_scale=1.0, **given)
    np.testing.assert_allclose(nowhere, alone, atol=1e-5)
    tiled = draw(pipe, tile=(16, 8), **given)[0]
    np.testing.assert_array_equal(tiled[half() == 0], picture()[half() == 0])
    assert (tiled != draw(pipe, **given)[0]).any()


def test_pictures_are_encoded_in_float32_beside_narrow_networks(tmp_path):
    mini.save(tmp_path)
    mesh = make_mesh(devices=toy.devices(1))
    narrow = SanaPipeline.from_pretrained(str(tmp_path), dtype="bfloat16", mesh=mesh)
    given, mask = picture(), half()
    (found,) = draw(narrow, image=given, mask=mask)
    np.testing.assert_array_equal(found[mask == 0], given[mask == 0])
    wide = SanaPipeline(narrow.checkpoint, mesh, "float32")
    data = wide.encode(given[None] / np.float32(127.5) - 1)
    latents = draw(narrow, image=given, mask=mask, output="latent")
    kept = ~redrawn_latents(mask[None], narrow.factor)[0, ..., 0]
    np.testing.assert_allclose(latents[0][kept], data[0][kept], atol=1e-4)


def test_what_users_hold_is_taken(pipe):
    given, mask = picture(), half()
    kinds = [
        dict(image=Image.fromarray(given), mask=Image.fromarray(mask)),
        dict(image=[Image.fromarray(given).convert("RGBA")], mask=mask > 0),
        dict(image=given[None], mask=[Image.fromarray(mask).convert("1")]),
        dict(image=given, mask=Image.fromarray(mask).convert("RGBA")),
        dict(image=jax.numpy.asarray(given), mask=jax.numpy.asarray(mask > 0)),
    ]
    first, *others = (draw(pipe, **kind) for kind in kinds)
    for other in others:
        np.testing.assert_array_equal(other, first)
    clear = Image.new("RGBA", (SIDE, SIDE), (10, 20, 30, 0))
    (found,) = draw(pipe, image=clear, mask=mask)
    assert (found[mask == 0] == 255).all()  # transparent: on white


class File:
    """An array that is read when it is needed."""

    shape, dtype = (SIDE, SIDE, 3), np.dtype(np.uint8)

    def __array__(self, dtype=None, copy=None):
        self.reads = getattr(self, "reads", 0) + 1
        return picture()


def test_what_numpy_can_read_is_read_once_when_it_is_drawn(pipe, monkeypatch):
    file = File()
    draw(pipe, image=file, mask=half())
    assert file.reads == 1
    np.testing.assert_array_equal(draw(pipe, image=File()), draw(pipe, image=picture()))
    monkeypatch.setattr(File, "__array__", lambda self: 1 / 0)
    assert pipe.request("a", image=File()).height == SIDE


FACTS = Facts(32, 1, 1024, 8, 300, 48, 3.0)
GIVEN = np.zeros((64, 96, 3), np.uint8)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(strength=0), "strength 0.0 leaves no step to be drawn: give more, up to 1"),
        (dict(strength=-0.1), "strength -0.1 is not a number in 0 .. 1"),
        (dict(strength=1.01), "strength 1.01 is not a number in 0 .. 1"),
        (dict(strength=float("nan")), "strength nan is not a number in 0 .. 1"),
        (dict(strength="0.5"), "strength '0.5' is not a number"),
        (dict(image=None, strength=0.5), "strength is of no use without an image"),
        (dict(image=None, mask=GIVEN[..., 0]), "mask is of no use without an image"),
        (dict(image="a.png"), "image 'a.png' is neither a PIL image nor an array of uint8"),
        (dict(image=GIVEN / 255), "image of float64 (64, 96, 3) is neither a PIL image nor"),
        (dict(image=GIVEN[..., :2]), "image of uint8 (64, 96, 2) is neither"),
        (dict(image=[]), "image has 0 pictures for 2 prompts"),
        (dict(image=[GIVEN] * 3), "image has 3 pictures for 2 prompts"),
        (dict(mask=[GIVEN[..., 0]] * 3), "mask has 3 pictures for 2 prompts"),
        (dict(image=[GIVEN, GIVEN[:32]]), "image is 96 x 32 pixels (width x height), where the"),
        (dict(mask=GIVEN[:32, :, 0]), "mask is 96 x 32 pixels (width x height), where the first"),
        (dict(mask=[GIVEN]), "mask of uint8 (64, 96, 3) is neither a PIL image nor an array of"),
        (dict(mask=GIVEN[..., 0] * 1.0), "mask of float64 (64, 96) is neither"),
        (dict(mask="m.png"), "mask 'm.png' is neither"),
        (
            dict(image=Image.new("I;16", (96, 64))),
            "image has Pillow's mode I;16: convert it to RGB",
        ),
        (dict(mask=Image.new("F", (96, 64))), "mask has Pillow's mode F: convert it to RGB or L"),
        (dict(mask=Image.new("RGBA", (96, 64))), "mask has transparent parts, which do not say"),
        (dict(mask=Image.new("LA", (96, 64), (255, 254))), "mask has transparent parts"),
        (
            dict(image=GIVEN[:50, :95]),
            "image is 95 x 50 pixels (width x height), which are no multiples of 32: resize it to"
            " a width of 64 or 96 and a height of 32 or 64",
        ),
        (dict(image=GIVEN[:50]), "image is 96 x 50 pixels (width x height), which are no mult"),
        (dict(height=96), "image is 96 x 64 pixels (width x height), where 96 x 96 pixels"),
        (dict(use_resolution_binning=True), "use_resolution_binning is for sizes without an image"),
    ],
)
def test_bad_arguments_are_refused(change, words):
    with pytest.raises(UserError) as error:
        Request.of(FACTS, ["a", "b"], **{"image": GIVEN, **change})
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [0, 1, 127])
def test_a_mask_that_redraws_nothing_is_refused_before_anything_is_drawn(pipe, monkeypatch, value):
    monkeypatch.setattr(SanaPipeline, "_encode", lambda *_: 1 / 0)
    mask = np.full((SIDE, SIDE), value, np.uint8)
    with pytest.raises(UserError, match=f"^mask redraws nothing: its brightest pixel is {value},"):
        draw(pipe, image=picture(), mask=mask)


def test_a_request_knows_the_size_and_the_steps():
    found = Request.of(FACTS, ["a", "b"], image=GIVEN, num_steps=20, strength=0.35)
    assert (found.height, found.width, len(found.schedule.sigma)) == (64, 96, 7)
    assert found.start.pictures[0] is GIVEN
    assert found.schedule.sigma[0] < 0.75
    whole = Request.of(FACTS, "a", image=GIVEN, strength=1.0)
    assert whole.start is None and len(whole.schedule.sigma) == 20
    white = np.full((64, 96), 255, np.uint8)
    assert Request.of(FACTS, "a", image=GIVEN, strength=1.0, mask=white).start is not None
