"""Checks of arguments and recipes: what passes, and that the message names what does not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from sana_jax.runtime import checks
from sana_jax.runtime.errors import UserError


@pytest.mark.parametrize("value", [True, 1.0, "3", None, 0, 10])
def test_what_is_no_whole_number_in_the_range_is_refused(value):
    with pytest.raises(checks.BadArgument, match=r"^steps .* is not a whole number in 1 \.\. 9$"):
        checks.integer("steps", value, 1, 9)


def test_numbers_of_numpy_become_those_of_python():
    found = checks.integer("steps", np.int64(9), 1, 9), checks.number("x", np.float32(0.5), 0, 1)
    assert found == (9, 0.5) and [*map(type, found)] == [int, float]


@pytest.mark.parametrize("of", [np.asarray, jnp.asarray])
def test_arrays_without_axes_are_numbers(of):
    assert checks.integer("steps", of(3), 1, 9) == 3
    assert checks.number("x", of(0.5), 0, 1) == 0.5
    assert checks.truth("x", of(True)) is True and checks.truth("x", of(False)) is False
    for check in checks.integer, checks.number:
        for value in of(True), of([1]):
            with pytest.raises(checks.BadArgument):
                check("x", value, 0, 9)


def test_what_is_neither_true_nor_false_is_refused():
    assert [checks.truth("x", value) for value in (True, 0, 1, np.bool_(True))] == [
        True,
        False,
        True,
        True,
    ]
    for value in 2, None, "yes", 1.0, np.ones(2):
        with pytest.raises(checks.BadArgument, match="^x .* is neither True nor False"):
            checks.truth("x", value)


def test_a_number_that_is_traced_is_refused():
    with pytest.raises(checks.BadArgument, match="^steps .* is not a whole number"):
        jax.jit(lambda steps: checks.integer("steps", steps, 1, 9))(3)


@pytest.mark.parametrize("value", [True, "0.5", float("nan"), 1.5, None])
def test_what_is_no_number_in_the_range_is_refused(value):
    with pytest.raises(checks.BadArgument, match=r"is not a number in 0 \.\. 1$") as error:
        checks.number("share", value, 0, 1)
    assert error.value.name == "share"


@pytest.mark.parametrize(
    "check, good, bad",
    [
        (lambda x: checks.at_least("x", x, 2), [2, 3.5, None], [1, float("nan")]),
        (lambda x: checks.within("x", x, 0, 1), [0, 1], [-0.1, 1.1, float("nan")]),
        (lambda x: checks.positive("x", x), [1e-9, 5], [0, -1, float("inf"), float("nan")]),
        (lambda x: checks.choice("x", x, ["a", "b"]), ["a"], ["c", None, ["a"]]),
    ],
    ids=["at_least", "within", "positive", "choice"],
)
def test_limits(check, good, bad):
    for value in good:
        check(value)
    for value in bad:
        with pytest.raises(UserError, match="^x"):
            check(value)


def test_a_side_that_is_no_multiple_gets_its_neighbours_named():
    checks.multiple("--size=96", 96, 32)
    with pytest.raises(UserError, match="--size=100 is not a multiple of 32: try 96 or 128"):
        checks.multiple("--size=100", 100, 32)
    assert checks.near(20, 32) == "32"


@dataclasses.dataclass
class Inner:
    rate: float = 0.1

    def __post_init__(self):
        checks.positive("rate", self.rate)


@dataclasses.dataclass
class Outer:
    steps: int
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_a_group_and_the_groups_in_it_become_dataclasses():
    fields = {"steps": 3, "inner": {"rate": 0.5}}
    found = checks.read_group(Outer, fields, "config.loop")
    assert found == Outer(3, Inner(0.5)) and checks.as_group(found) == fields
    assert checks.as_group(found, "inner") == {"steps": 3}
    with pytest.raises(UserError, match=r"^config\.loop\.inner\.rate=-1: give a positive number$"):
        checks.read_group(Outer, {"steps": 3, "inner": {"rate": -1}}, "config.loop")
    with pytest.raises(UserError, match="^config.loop: .*unexpected keyword argument 'step'"):
        checks.read_group(Outer, {"step": 3}, "config.loop")


def test_the_least_numbers_of_a_recipe():
    recipe = {"seed": 0, "keep": 1, "data": {"shapes": {"seed": 0}}, "batch": 8}
    checks.check_least(ConfigDict(recipe), {"batch": 8})
    for change in {"keep": 0}, {"seed": -1}, {"seed": 2**32}, {"batch": 7}:
        (key,) = change
        with pytest.raises(UserError, match=f"^config.{key}="):
            checks.check_least(ConfigDict(recipe | change), {"batch": 8})
