"""The shapes in annotations are checked while tests run."""

import jax.numpy as jnp
import pytest
from jaxtyping import Array, Float, TypeCheckError, jaxtyped

from sana_jax.diffusion import dpm_solver
from tests.annotations import check_arrays


def test_an_array_of_another_shape_is_refused():
    schedule = dpm_solver.flow_dpm_solver(2, 1.0)
    with pytest.raises(TypeCheckError, match="noise"):
        dpm_solver.solve(lambda x, t, s: x, jnp.zeros((4, 4, 3)), schedule)


def test_arrays_are_checked_and_other_arguments_are_not():
    @jaxtyped(typechecker=check_arrays)
    def rows(x: Float[Array, "B C"], count: int, after: int = 0) -> Float[Array, "{count} C"]:
        return x[after : after + count]

    assert rows(jnp.zeros((3, 2)), True).shape == (1, 2)
    with pytest.raises(TypeCheckError, match="return value"):
        rows(jnp.zeros((3, 2)), 2, after=2)
    with pytest.raises(TypeCheckError, match="parameter 'x'"):
        rows(jnp.zeros((3, 2), jnp.int32), 2)
