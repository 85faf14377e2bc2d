"""A config of a user's own has the keys of a recipe, in their types and within their bounds."""

import re

import pytest
from ml_collections import ConfigDict, config_dict

from sana_jax.runtime.errors import UserError
from sana_jax.training.config_types import check_types

RECIPE = {
    "seed": 0,
    "rate": 0.5,
    "flip": False,
    "name": "came",
    "sizes": (1, 2),
    "loader": {"threads": 8, "network": {"depth": 2}},
}


def recipe():
    return ConfigDict(RECIPE | {"start": config_dict.placeholder(str)})


def changed(**changes):
    """Returns the recipe as a file may have it that makes a ConfigDict of its own."""
    fields = RECIPE | {"start": None} | changes
    return ConfigDict({name: value for name, value in fields.items() if value != "MISSING"})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rate": 1},
        {"start": "shapes"},
        {"sizes": [3]},
        {"loader": {"threads": None, "network": None}},
        {"more": object()},
    ],
)
def test_a_config_may_differ_in_values_and_have_more(changes):
    check_types(changed(**changes), recipe(), but=["network"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": [3]}, "config.seed=[3]: give a whole number"),
        ({"seed": 1.0}, "config.seed=1.0: give a whole number"),
        ({"seed": True}, "config.seed=True: give a whole number"),
        ({"seed": None}, "config.seed=None: give a whole number"),
        ({"seed": 10**400}, "config.seed=1000"),
        ({"rate": "fast"}, "config.rate='fast': give a number"),
        ({"rate": float("inf")}, "config.rate=inf: give a finite number"),
        ({"rate": float("nan")}, "config.rate=nan: give a finite number"),
        ({"flip": 1}, "config.flip=1: give True or False"),
        ({"name": ("came",)}, "config.name=('came',): give a text"),
        ({"start": 5}, "config.start=5: give a text"),
        ({"sizes": 5}, "config.sizes=5: give a tuple"),
        ({"sizes": (5, -(10**9))}, "config.sizes=-1000000000: give a number up to"),
        ({"loader": 5}, "config.loader is no ConfigDict"),
        ({"loader": {"threads": 10**6, "network": None}}, "config.loader.threads=1000000: give"),
        ({"loader": {"network": None}}, "config.loader.threads is missing"),
        ({"name": "MISSING"}, "config.name is missing: let the --config file start from a recipe"),
    ],
    ids=str,
)
def test_keys_that_are_missing_or_of_another_type_are_named(changes, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        check_types(changed(**changes), recipe(), but=["network"])


def test_what_is_no_config_is_refused():
    with pytest.raises(UserError, match="^config is no ConfigDict, which get_config"):
        check_types(None, recipe())
