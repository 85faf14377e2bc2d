"""Checks a config, which its user may have written, against a recipe that has all the keys."""

import math
import numbers
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from sana_jax.runtime.errors import UserError

WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
MOST = 2**32  # that a number which counts anything may be
OPTIONAL = "threads", "clip_norm"  # may be None, whatever the recipe has
# The largest values of keys that threads, memory or the depth of a network depend on.
LARGEST = {
    "threads": 1024,
    "prefetch": 1024,
    "cache_gib": 2**20,
    "size": 2**15,
    "sizes": 2**15,
    "image_size": 2**15,
    "unroll": 1024,
    "layers": 64,
    "width": 2**16,
}


def check_types(
    config: Any, recipe: ConfigDict, but: Collection[str] = (), key: str = "config"
) -> None:
    """Raises UserError, naming the key, unless `config` has every key of `recipe` in its type.

    Numbers are finite and no larger than LARGEST or MOST. Keys that the recipe lacks are not looked
    at, nor are those named in `but`, at any level.
    """
    if not isinstance(config, ConfigDict):
        raise UserError(f"{key} is no ConfigDict, which get_config in the --config file returns")
    for name in recipe:
        path = f"{key}.{name}"
        if name not in config:
            raise UserError(f"{path} is missing: let the --config file start from a recipe")
        if name in but:
            continue
        if isinstance(recipe[name], ConfigDict):
            check_types(config[name], recipe[name], but, path)
        elif config[name] is not None or not (recipe[name] is None or name in OPTIONAL):
            _check(path, config[name], recipe.get_type(name))
            _check_size(path, config[name], LARGEST.get(name, MOST))


def _check(path: str, value: Any, kind: type) -> None:
    if kind in (list, tuple):
        if not isinstance(value, list | tuple):
            raise UserError(f"{path}={value!r:.60}: give a tuple")
    elif kind in WORDS:
        fits = isinstance(value, {int: numbers.Integral, float: numbers.Real}.get(kind, kind))
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{path}={value!r:.60}: give {WORDS[kind]}")


def _check_size(path: str, value: Any, most: int) -> None:
    """Checks the numbers in `value`, a number or tuples of them; anything else passes."""
    if isinstance(value, list | tuple):
        for item in value:
            _check_size(path, item, most)
    elif isinstance(value, numbers.Integral):
        if not -most <= value <= most:
            raise UserError(f"{path}={str(value):.60}: give a number up to {most}")
    elif isinstance(value, numbers.Real) and not math.isfinite(value):
        raise UserError(f"{path}={value}: give a finite number")
