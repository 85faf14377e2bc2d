"""Checks of arguments and of a recipe's figures. Each raises UserError, naming the argument."""

import contextlib
import dataclasses
import numbers
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sana_jax.runtime.errors import UserError

MAX_SEED = 2**32 - 1  # of a training: jax.random.key keeps 32 bits
MAX_PICTURE_SEED = 2**64 - 1  # the two words of a key
MAX_TEXT = 2**20  # characters; a prompt is cut after some hundred tokens, and all are made first
MAX_STEPS = 1000
# The least that numbers of every recipe may be which belong to no group with a dataclass.
LEAST = {
    "seed": 0,
    "data.shapes.seed": 0,
    "keep": 1,  # or the step that was just saved would go too
}


class BadArgument(UserError):
    """A bad argument; `name` lets a caller say where its user gave it."""

    def __init__(self, name: str, wrong: str):
        self.name = name
        super().__init__(f"{name} {wrong}")


def plain(value: Any) -> Any:
    """Returns a scalar of NumPy or JAX, an array without axes included, as one of Python."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        with contextlib.suppress(TypeError, RuntimeError):  # traced, or deleted: it has no value
            return value.item()
    return value


def listed(value: Any) -> list | None:
    """Returns the values of a sequence, or of an array with one axis, else None."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return list(value)
    return list(value) if getattr(value, "ndim", None) == 1 else None


def truth(name: str, value) -> bool:
    """Returns `value` as a bool. 0 and 1 count."""
    value = plain(value)
    if not isinstance(value, int) or value not in (0, 1):
        raise BadArgument(name, f"{value!r} is neither True nor False")
    return bool(value)


def integer(name: str, value, low: int, high: int) -> int:
    """Returns `value` as an int in low .. high. Integers of NumPy and JAX count, bools do not."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise BadArgument(name, f"{value!r} is not a whole number in {low} .. {high}")
    if not low <= int(value) <= high:
        raise BadArgument(name, f"{value} is not a whole number in {low} .. {high}")
    return int(value)


def number(name: str, value, low: float, high: float) -> float:
    """Returns `value` as a float in low .. high. Numbers of NumPy and JAX count, bools do not."""
    value = plain(value)
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not low <= value <= high:
        raise BadArgument(name, f"{value!r} is not a number in {low:g} .. {high:g}")
    return float(value)


def at_least(name: str, value: float | None, least: float) -> None:
    """Checks that `value` is `least` or more. None, which stands for a default, passes."""
    if value is not None and not value >= least:
        raise UserError(f"{name}={value}: it is at least {least}")


def within(name: str, value: float, low: float, high: float) -> None:
    """Checks that `value` is in low .. high."""
    if not low <= value <= high:
        raise UserError(f"{name}={value}: give {low} to {high}")


def positive(name: str, value: float) -> None:
    """Checks that `value` is above 0 and finite."""
    if not 0 < value < float("inf"):
        raise UserError(f"{name}={value}: give a positive number")


def multiple(given: str, side: int, step: int) -> None:
    """Checks that `side`, in pixels, is a multiple of `step`; `given` is the caller's spelling."""
    if side % step:
        raise UserError(f"{given} is not a multiple of {step}: try {near(side, step)}")


def near(side: int, step: int) -> str:
    """Returns the multiples of `step` on both sides of `side`, in words."""
    low = side // step * step
    return f"{low} or {low + step}" if low else str(step)


def choice(name: str, value, choices: Collection[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{name} {value!r} is not one of {', '.join(choices)}")
    return value


def read_group(kind: Any, fields: Mapping[str, Any], key: str) -> Any:
    """Reads a group of a recipe's keys into its dataclass, and nested groups into theirs.

    Args:
      kind: the dataclass; its `__post_init__` begins a message with the name of the field.
      fields: the group, a plain dict.
      key: what the user calls the group, such as "config.loop", for messages.
    """
    fields = dict(fields)
    for field in dataclasses.fields(kind):
        group: Any = field.type
        if dataclasses.is_dataclass(group) and field.name in fields:
            fields[field.name] = read_group(group, fields[field.name], f"{key}.{field.name}")
    try:
        return kind(**fields)
    except TypeError as error:
        raise UserError(f"{key}: {error}") from None
    except UserError as error:
        raise UserError(f"{key}.{error}") from None


def as_group(values: Any, *but: str) -> dict[str, Any]:
    """Returns a dataclass as a group of a recipe's keys, without the fields named in `but`."""
    return {name: x for name, x in dataclasses.asdict(values).items() if name not in but}


def check_least(config: Any, more: Mapping[str, int]) -> None:
    """Checks the numbers of a recipe against LEAST and against `more`, a table of the same kind."""
    for key, least in (LEAST | dict(more)).items():
        at_least(f"config.{key}", operator.attrgetter(key)(config), least)
    if config.seed > MAX_SEED:
        raise UserError(f"config.seed={config.seed}: it is at most {MAX_SEED}")
