"""Programs by shapes alone; tests/test_compile.py compiles them for TPUs."""

import dataclasses

import jax
import pytest

from sana_jax.measure import programs
from sana_jax.models.dit import SPRINT, SanaConfig
from sana_jax.runtime.errors import UserError
from sana_jax.sharding import make_mesh
from tests import toy
from tests.test_same_as_before import AUTOENCODER

DIT = SanaConfig(4, 1, 16, 8, 1, 16, mlp_ratio=1.0, sample_size=4)


def test_a_forward_pass_has_the_batch_and_the_size_that_were_asked_for():
    mesh = make_mesh(devices=toy.devices(2))
    program = programs.drawing("forward", DIT, AUTOENCODER, mesh, 4)
    assert (program.batch, program.size, program.calls) == (4, 16, 1)
    params, latents, timestep, captions, mask = program.arguments
    assert latents.shape == (4, 4, 4, 4) and timestep.shape == (4,)
    assert captions.shape == (4, programs.TEXT_ROWS, 16) and mask.dtype == bool
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jax.numpy.dtype("bfloat16")}
    with jax.set_mesh(mesh):
        assert jax.eval_shape(program.function, *program.arguments).shape == (4, 4, 4, 4)


@pytest.mark.parametrize("kind, halves", [({}, 2), (SPRINT, 1)])
def test_a_loop_has_the_steps_that_were_asked_for(kind, halves):
    """Sprint has one evaluation a step, and noise for each."""
    mesh, dit = make_mesh(devices=toy.devices(1)), dataclasses.replace(DIT, **kind)
    program = programs.drawing("sample", dit, AUTOENCODER, mesh, 2, steps=4)
    _, latents, schedule, captions, *_, fresh = program.arguments
    assert schedule.sigma.shape == (4,) and captions.shape[:2] == (2, halves)
    assert (None if fresh is None else fresh.shape) == (None if halves == 2 else (2, 4, 4, 4, 4))
    once = programs.drawing("forward", dit, AUTOENCODER, mesh, 2)
    assert program.flops == halves * 4 * once.flops
    assert (program.steps, once.steps) == (4, None)
    with jax.set_mesh(mesh):
        for each in program, once:
            assert jax.eval_shape(each.function, *each.arguments).shape == latents.shape


def test_a_size_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="--size=30 is not a multiple of 4: try 28 or 32"):
        programs.drawing("forward", DIT, AUTOENCODER, make_mesh(devices=toy.devices(1)), 4, 30)
