"""The type and range checks that the configs of all networks share."""

import dataclasses
import math
import types
import typing


def check_fields(config, network: str) -> None:
    """Raises ValueError, naming the field, if a value does not have its declared type.

    Numbers must also be positive and finite; integers in a tuple may be zero.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _fits(value, hints[field.name]):
            raise ValueError(f"{network} {field.name} {value!r} is not {_name(hints[field.name])}")


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
