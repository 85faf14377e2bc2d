"""Which steps a call asks for, and that the options of one sampler are refused by the other."""

import dataclasses
import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.diffusion import dpm_solver, scm
from sana_jax.pipeline.facts import Facts
from sana_jax.pipeline.request import Request
from sana_jax.pipeline.steps import Steps, count_of, refuse_second_half
from sana_jax.runtime.checks import BadArgument
from sana_jax.runtime.errors import UserError

SANA = Facts(32, 1, 1024, 8, 300, 48, 3.0)
SPRINT = dataclasses.replace(SANA, is_sprint=True)
PICTURE = np.zeros((64, 64, 3), np.uint8)


def test_sana_is_drawn_by_its_own_solver_in_twenty_steps():
    assert Steps.of(SANA, None, None, None, None) == Steps("flow_dpm_solver", 20, 3.0)
    found = Steps.of(SANA, 3, "flow_euler", 1.5, None)
    for ours, expected in zip(found.schedule, dpm_solver.flow_euler(3, 1.5), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_sprint_is_drawn_by_scm_in_two_steps():
    found = Steps.of(SPRINT, None, None, None, None)
    assert found == Steps("scm", 2, None, scm.PAPER[2])
    assert Steps.of(SPRINT, 4, "scm", None, "diffusers").angles == scm.named_angles("diffusers", 4)
    assert len(Steps.of(SPRINT, 7, None, None, None).schedule.sigma) == 7


@pytest.mark.parametrize("of", [list, tuple, np.asarray, jnp.asarray])
def test_angles_may_be_any_list(of):
    found = Steps.of(SPRINT, None, None, None, of([1.5, 0.5, 0.0]))
    assert found.angles == (1.5, 0.5, 0.0) and found.num_steps == 2 and not found.is_named
    assert Steps.of(SPRINT, 2, None, None, of([1.5, 0.5, 0.0])) == found
    assert count_of(of([1.5, 0.5, 0.0])) == 2 and count_of("paper") is count_of(None) is None


@pytest.mark.parametrize(
    "facts, arguments, words",
    [
        (SANA, dict(sampler="scm"), "sampler scm is for Sana-Sprint"),
        (SANA, dict(angles="paper"), "angles are for Sana-Sprint"),
        (SPRINT, dict(sampler="flow_euler"), "sampler flow_euler is not for Sana-Sprint"),
        (SPRINT, dict(sampler="ddim"), "sampler 'ddim' is not one of"),
        (SPRINT, dict(flow_shift=3.0), "flow_shift is not for Sana-Sprint"),
        (SPRINT, dict(guidance_interval=(0, 1)), "guidance_interval is of no use to Sana-Sprint"),
        (SPRINT, dict(negative_prompt="dark"), "negative_prompt is of no use to Sana-Sprint"),
        (SPRINT, dict(sequential_guidance=True), "sequential_guidance is of no use"),
        (SPRINT, dict(unconditional_mask="negative"), "unconditional_mask is of no use"),
        (SPRINT, dict(num_steps=0), "num_steps 0"),
        (SPRINT, dict(num_steps=3, angles="paper"), "angles paper: the paper has schedules of 1"),
        (SPRINT, dict(num_steps=3, angles=[1.5, 0]), "num_steps 3: the angles are those of 1"),
        (SPRINT, dict(angles="linear"), "angles 'linear' is not one of paper, diffusers"),
        (SPRINT, dict(angles=5), "angles 5 is not one of paper, diffusers"),
        (SPRINT, dict(angles=[1.0, "a"]), "angles 'a' is not a number"),
        (SPRINT, dict(angles=[1.0, 1.2, 0]), "angles [1.0, 1.2, 0]: 1.2 comes after 1"),
        (SPRINT, dict(angles=[]), "angles []: it takes two angles or more"),
        (SPRINT, dict(image=PICTURE, strength=0.6), "strength 0.6 of 2 steps is all of them"),
        (SPRINT, dict(image=PICTURE, num_steps=1), "strength 0.5 of 1 steps is all of them"),
        (SPRINT, dict(latents=np.zeros((1, 3, 32, 32, 8), np.float32)), "latents is (1, 3, 32"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(facts, arguments, words):
    with pytest.raises(UserError) as error:
        Request.of(facts, "a cat", **arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_sprint_is_not_guided_by_a_second_half():
    found = Request.of(SPRINT, "a cat", guidance_scale=4.5, negative_prompt=["", ""][:1])
    assert not found.guided and found.steps.flow_shift is None
    refuse_second_half(negative_prompt="", guidance_interval=None)
    with pytest.raises(BadArgument, match="^negative_prompt is of no use"):
        refuse_second_half(negative_prompt="dark")


def test_a_picture_decides_where_steps_are_left():
    """Strength 1 of a schedule is text to image; a list of angles begins where it says."""
    assert Request.of(SPRINT, "a", image=PICTURE, strength=1).start is None
    half = Request.of(SPRINT, "a", image=PICTURE)
    assert half.start.strength == 0.5 and len(half.schedule.sigma) == 1
    assert half.schedule.sigma[0] == np.float32(scm.flow_time(1.3))
    listed = Request.of(SPRINT, "a", image=PICTURE, strength=1, angles=[1.1, 0.5, 0])
    assert listed.start is not None and len(listed.schedule.sigma) == 2
    mask = np.full((64, 64), 255, np.uint8)
    assert Request.of(SPRINT, "a", image=PICTURE, mask=mask, strength=1).start is not None


def test_the_checks_of_all_arguments_name_parameters_of_a_request():
    assert set(inspect.signature(Steps.of).parameters) - {"facts"} <= set(
        inspect.signature(Request.of).parameters
    )
