"""Which prompt a picture is scored against as a control."""

import jax.numpy as jnp
import pytest

from sana_jax.checkpoints import native
from sana_jax.models.dit import SPRINT
from sana_jax.pipeline.pipeline import SanaPipeline
from sana_jax.runtime.errors import UserError
from sana_jax.shapes.captions import prompts
from sana_jax.shapes.draw import draw
from sana_jax.shapes.evaluation import Options, another, figures, measure
from sana_jax.shapes.parse import parse
from tests import mini


@pytest.mark.parametrize("count", [6, 8, 10])
def test_the_control_is_another_prompt_with_as_many_objects(count):
    asked = prompts(count)
    others = [another(k, count) for k in range(count)]
    assert sorted(others) == list(range(count))
    for k, other in enumerate(others):
        same = [j for j in range(count) if asked[j].facts["count"] == asked[k].facts["count"]]
        assert other in same and (other != k or same == [k])


def test_the_control_of_swapped_pictures_is_right():
    """Ten prompts: the last four pictures meet prompts with as many objects too."""
    asked = prompts(10)
    truth = [parse(draw(each.scene, 64, 64)) for each in asked]
    counts = [each.facts["count"] for each in asked]
    after = [
        next(j % 10 for j in range(k + 1, k + 11) if counts[j % 10] == counts[k]) for k in range(10)
    ]
    found = figures(asked, [truth[k] for k in after], truth, truth)
    assert found["control_shuffled"] == found["parser_overall"] == 1
    assert found["overall"] < 0.5
    share = found["overall"]
    assert found["overall_error"] == pytest.approx((share * (1 - share) / 10) ** 0.5)
    assert figures(asked, truth, truth, truth)["control_shuffled"] < 0.5
    assert figures(asked[:4], truth[:4], truth[:4], truth[:4])["control_shuffled"] is None


def diverged(pipe, latents):
    return jnp.full((len(latents), 64, 64, 3), jnp.inf)


def grey(pipe, latents):
    return jnp.zeros((len(latents), 64, 64, 3))


@pytest.fixture
def asked_for(tmp_path, monkeypatch):
    """A checkpoint whose pipeline samples nothing; the settings that it was asked to sample by."""
    mini.save(tmp_path)
    found = []

    def sample(pipe, prompts, **settings):
        found.append(settings)
        return jnp.zeros((len(prompts), 2, 2, pipe.latent_channels))

    monkeypatch.setattr(SanaPipeline, "__call__", sample)
    return tmp_path, found


def test_drawn_pictures_that_are_not_finite_are_refused(asked_for, monkeypatch):
    """8 bits would hide it."""
    monkeypatch.setattr(SanaPipeline, "decode", diverged)
    with pytest.raises(UserError, match="draws some pictures with NaN or infinite"):
        measure(str(asked_for[0]), Options(count=4, batch_size=8))


@pytest.mark.parametrize(
    "given",
    [dict(num_steps=2), dict(guidance_scale=1.0), dict(angles=(1.5, 0.0)), dict(lora=["a.st"])],
)
def test_what_draws_nothing_takes_no_settings_of_drawing(tmp_path, given):
    mini.save(tmp_path / "whole")
    native.save(mini.alone(tmp_path / "whole"), tmp_path / "vae")
    with pytest.raises(UserError, match=f"--{[*given][0]}: .*vae lacks a transformer"):
        measure(str(tmp_path / "vae"), Options(count=4, **given))


@pytest.mark.parametrize("given, used", [(None, 3.0), (1.5, 1.5)])
def test_the_shift_is_the_checkpoints_or_what_is_given(asked_for, monkeypatch, given, used):
    monkeypatch.setattr(SanaPipeline, "decode", grey)
    folder, settings = asked_for
    found, _ = measure(str(folder), Options(count=4, batch_size=8, flow_shift=given))
    assert found["flow_shift"] == used == settings[0]["flow_shift"]


@pytest.mark.parametrize("angles, steps", [(None, 2), ((1.5, 1.1, 0.5, 0.0), 3), ("diffusers", 2)])
def test_sprint_is_drawn_at_the_angles_that_are_given(asked_for, monkeypatch, angles, steps):
    monkeypatch.setattr(SanaPipeline, "decode", grey)
    folder, settings = asked_for
    mini.save(folder / "sprint", **SPRINT)
    found, _ = measure(str(folder / "sprint"), Options(count=4, batch_size=8, angles=angles))
    assert settings[0]["angles"] == found["options"]["angles"] == angles
    assert found["options"]["num_steps"] == settings[0]["num_steps"] == steps
    with pytest.raises(UserError, match="angles are for Sana-Sprint"):
        measure(str(folder), Options(count=4, angles=[1.5, 0.0]))
