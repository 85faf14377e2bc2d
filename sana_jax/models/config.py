"""The type and range checks that the configs of all networks share.

The limits are far above every published network, and low enough that a network within them is
described in seconds: nothing tells yet whether the weights of that network are there.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

# Layers, by path, and how each stands in the parameters: for networks with quantised weights.
Layers = tuple[tuple[str, str], ...]

MAX_WIDTH = 2**18  # of an axis of a weight; the largest language models have 2**16
MAX_LAYERS = 1000  # of one stack; the deepest SANA has 60
MAX_TOKENS = 2**31 - 1  # positions and windows, which no array's size depends on
LEAST, MOST = 1e-12, 1e12  # of a factor: float32 holds the product of three


def check_fields(config, network: str, **most: int) -> None:
    """Raises ValueError, naming the field, if a value does not have its declared type.

    Numbers must also be positive and within limits: integers at most what `most` says of their
    field, or else MAX_WIDTH. Integers in a tuple may be zero.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if not _fits(value, hint):
            raise ValueError(f"{network} {field.name} {value!r} is not {_name(hint)}")
        is_factor = float in (hint, *typing.get_args(hint))
        low, high = (LEAST, MOST) if is_factor else (0, most.get(field.name, MAX_WIDTH))
        if not all(low <= number <= high for number in _numbers(value)):
            limits = f"{low:g} .. {high:g}" if is_factor else f"at most {high}"
            raise ValueError(f"{network} {field.name} {value!r} is beyond the limit, {limits}")


def check_choices(config, network: str, choices: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError, naming the field, unless each field named in `choices` has one of them."""
    for name, known in choices.items():
        if (value := getattr(config, name)) not in known:
            raise ValueError(f"{network} {name} {value!r} is not one of {', '.join(known)}")


def later(default: Any, repr: bool = True) -> Any:
    """Returns a field that the first version of our files does not have; see `without_later`.

    Hashes of encoded data have a config's repr in them: one `repr` leaves out does not change them.
    """
    return dataclasses.field(default=default, repr=repr, metadata={"later": True})


def without_later(kind: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config of `kind`, without later ones that have their default.

    So the files of networks that need no later field are as they were, and older programs read
    them.
    """
    later = {f.name: f.default for f in dataclasses.fields(kind) if f.metadata.get("later")}
    return {name: x for name, x in fields.items() if name not in later or x != later[name]}


def check_width(network: str, name: str, value: float) -> None:
    """Raises ValueError unless `value`, the product of fields that `name` tells, is a width."""
    if not 1 <= value <= MAX_WIDTH:
        raise ValueError(f"{network} {name} is {value:g}, not in 1 .. {MAX_WIDTH}")


def _numbers(value) -> list:
    if isinstance(value, tuple):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, int | float) else []


def _fits(value, hint) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if hint is types.NoneType:
        return value is None
    if typing.get_origin(hint) is tuple:
        (kind, _) = typing.get_args(hint)
        zero = [0] if kind is int else []  # a stage without layers
        return isinstance(value, tuple) and all(v in zero or _fits(v, kind) for v in value)
    if hint is int:
        return type(value) is int and value > 0
    if hint is float:
        return type(value) in (int, float) and 0 < value < math.inf
    return type(value) is hint


def _name(hint) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_name, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list, each {_name(typing.get_args(hint)[0])}"
    names = {int: "a positive whole number", float: "a positive number", bool: "true or false"}
    return names.get(hint) or {str: "a text", types.NoneType: "null"}[hint]
