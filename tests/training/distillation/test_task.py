"""The steps of the distillation, on networks that compile in seconds."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sana_jax.diffusion import trigflow
from sana_jax.runtime.errors import UserError
from sana_jax.training.distillation.task import DistillationConfig
from tests import toy as measures
from tests.training.distillation import toy

replace = dataclasses.replace


def start(task, student=None):
    state = nn.unbox(jax.jit(task.init)(jax.random.key(0)))
    weights = student or toy.random_params(toy.STUDENT)
    params = state.params | {"dit": jax.tree.map(jnp.asarray, weights)}
    return state.replace(params=params, ema={"dit": jax.tree.map(jnp.copy, params["dit"])})


def moved(before, after):
    """The names of the parts of which something changed."""

    def same(name):
        pairs = zip(jax.tree.leaves(before[name]), jax.tree.leaves(after[name]), strict=True)
        return all(np.array_equal(a, b) for a, b in pairs)

    return {name for name in before if not same(name)}


def test_reading_the_teacher_through_trigflow_loses_nothing():
    """The flow's own velocity comes back from F, and the student starts as the teacher."""
    task, frozen, batch = toy.make_task(), toy.frozen(), toy.make_batch()
    text, x = (batch["embeddings"], batch["mask"]), jnp.asarray(batch["latents"])
    angle = jnp.array([0.05, 0.7, 1.3, np.pi / 2])
    found = task._velocity(task.teacher, frozen.dit, x, angle, text)
    sin, cos = (f(angle)[:, None, None, None] for f in (jnp.sin, jnp.cos))
    time = 1000 * trigflow.flow_time(angle) * toy.TEACHER.timestep_scale
    own = task.teacher.apply({"params": frozen.dit}, x / (cos + sin), time, *text)
    measures.assert_close((cos + sin) * found - (cos - sin) * x, own, 1e-6)

    fresh = nn.unbox(task._init_student(jax.random.key(0)))
    weights = jax.tree.map(np.asarray, frozen.dit)
    weights["time_embed"] = {**fresh["time_embed"], **weights["time_embed"]}
    for guidance in 0.0, 4.5:
        ours = task._velocity(task.dit, weights, x, angle, text, jnp.full(4, guidance))
        np.testing.assert_array_equal(ours, found)


def test_guidance_is_that_of_two_evaluations():
    task, frozen, batch = toy.make_task(), toy.frozen(), toy.make_batch()
    text, x = (batch["embeddings"], batch["mask"]), jnp.asarray(batch["latents"])
    angle, guidance = jnp.linspace(0.2, 1.5, 4), jnp.array([1.0, 0.0, 4.5, 2.0])
    both = partial(task._velocity, task.teacher, frozen.dit, x, angle)
    null = tuple(jnp.broadcast_to(x, (4, *x.shape)) for x in frozen.null)
    u, c = both(null), both(text)
    expected = u + guidance[:, None, None, None] * (c - u)
    found = task._guided(frozen.dit, x, angle, text, guidance, frozen)
    measures.assert_close(found, expected, 1e-6)
    # NVlabs' unconditional half reads the empty prompt through the caption's mask.
    nvlabs = toy.make_task(recipe=replace(toy.RECIPE, keep_mask=True))
    kept = nvlabs._guided(frozen.dit, x, angle, text, jnp.zeros(4), frozen)
    measures.assert_close(kept, both((null[0], text[1])), 1e-6)


def test_two_steps_take_turns_and_each_moves_its_own():
    task, frozen, batch = toy.make_task(), toy.frozen(), toy.make_batch()
    student, discriminator = map(jax.jit, task.steps)
    first = start(task)
    second, metrics = student(first, batch, frozen)
    assert moved(first.params, second.params) == {"dit", "log_variance"}
    assert moved(first.opt_state, second.opt_state) == {"student"}
    assert {"consistency", "generator", "loss", "learning_rate"} <= metrics.keys()
    third, metrics = discriminator(second, batch, frozen)
    assert moved(second.params, third.params) == {"heads", "spectral"}
    assert moved(second.opt_state, third.opt_state) == {"discriminator"}
    assert moved(second.ema, third.ema) == set() and moved(first.ema, second.ema) == {"dit"}
    assert {"discriminator", "real_logit", "fake_logit"} <= metrics.keys()
    assert int(third.step) == 2 and int(third.skipped) == 0


@pytest.mark.slow  # compiles steps more often
def test_a_loss_of_weight_zero_is_left_out():
    alone = toy.make_task(replace(toy.FIGURES, adversarial=0.0))
    state = start(alone)
    assert len(alone.steps) == 1 and state.params.keys() == {"dit", "log_variance"}
    ladd = toy.make_task(replace(toy.FIGURES, consistency=0.0))
    _, metrics = jax.jit(ladd.student_step)(start(ladd), toy.make_batch(), toy.frozen())
    assert "consistency" not in metrics and "generator" in metrics


def test_what_the_warmup_counts():
    """The paper's counts the student's updates, NVlabs' all steps."""
    task = toy.make_task()
    state = start(task)
    nvlabs = toy.make_task(replace(toy.FIGURES, warmup_counts="all"))
    for step, ours, theirs in (0, 0, 0), (1, 0, 0.5), (2, 0.5, 1), (3, 0.5, 1), (9, 1, 1):
        now = state.replace(step=jnp.int32(step))
        assert (float(task._warmup(now)), float(nvlabs._warmup(now))) == (ours, theirs)


def test_draws_of_a_row_do_not_depend_on_the_batch():
    task, key = toy.make_task(), jax.random.key(3)
    few, more = (task._draw(key, toy.make_batch(rows)) for rows in (2, 4))
    for name in few:
        np.testing.assert_array_equal(few[name], more[name][:2])
    names = "angle", "fresh_angle", "look", "other"
    assert len({float(few[name][0]) for name in names}) == len(names)


@pytest.mark.slow  # compiles steps more often
def test_microbatches_give_the_loss_of_the_batch():
    """Of the student alone: the discriminator's norm is over the samples that it sees at once."""
    frozen, batch, found = toy.frozen(), toy.make_batch(), []
    for count in 1, 2:
        recipe = replace(toy.RECIPE, microbatches=count)
        task = toy.make_task(replace(toy.FIGURES, adversarial=0.0), recipe=recipe)
        _, metrics = jax.jit(task.student_step)(start(task), batch, frozen)
        found.append([float(metrics[name]) for name in ("loss", "gradient_norm")])
    np.testing.assert_allclose(*found, rtol=1e-5)


@pytest.mark.slow  # compiles steps more often
def test_the_options_of_the_discriminator_change_its_loss():
    frozen, batch = toy.frozen(), toy.make_batch()
    values = []
    for change in (
        {},
        dict(separate_angles=True),
        dict(misaligned=True),
        dict(discriminator_largest=0.5),
    ):
        task = toy.make_task(replace(toy.FIGURES, largest_probability=1.0, **change))
        values.append(
            float(jax.jit(task.discriminator_step)(start(task), batch, frozen)[1]["discriminator"])
        )
    assert np.isfinite(values).all() and len(set(values)) == 4


def test_a_batch_that_the_discriminator_s_norm_cannot_split_is_refused_before_a_step():
    for batch, microbatches in (9, 1), (40, 2):
        recipe = replace(toy.RECIPE, batch_size=batch, microbatches=microbatches)
        with pytest.raises(UserError, match=f"batch of {batch // microbatches}, .* of one size"):
            toy.make_task(recipe=recipe)
        toy.make_task(replace(toy.FIGURES, adversarial=0.0), recipe=recipe)


@pytest.mark.parametrize(
    "wrong, told",
    [
        (dict(guidance=()), "guidance is empty"),
        (dict(warmup_counts="both"), "warmup_counts='both': give student or all"),
        (dict(angle_std=0.0), "angle_std=0.0"),
        (dict(largest_probability=2.0), "largest_probability=2.0"),
        (dict(discriminator_largest=2.0), "discriminator_largest=2.0"),
        (dict(adversarial=-1.0), "adversarial=-1.0"),
        (dict(consistency=0.0, adversarial=0.0), "there is no loss"),
        (dict(blocks=(1, 0)), "blocks=(1, 0)"),
    ],
)
def test_bad_figures_are_refused(wrong, told):
    with pytest.raises(UserError) as error:
        DistillationConfig(**wrong)
    assert told in str(error.value)
