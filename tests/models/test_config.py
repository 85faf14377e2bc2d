"""What a config says of values that cannot be."""

import dataclasses

import pytest

from sana_jax.models.config import check_fields


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 8
    scale: float | None = None
    bias: bool = False
    kind: str = "plain"
    layers: tuple[int, ...] = (0, 2)
    windows: tuple[tuple[int, ...], ...] = ((), (3, 5))


@pytest.mark.parametrize(
    "change", [{}, dict(scale=2), dict(scale=0.5), dict(layers=()), dict(windows=())], ids=str
)
def test_fields_of_their_types(change):
    check_fields(Config(**change), "network")


@pytest.mark.parametrize(
    "change, kind",
    [
        (dict(width=0), "a positive whole number"),
        (dict(width=8.0), "a positive whole number"),
        (dict(width=True), "a positive whole number"),
        (dict(scale=-1.0), "a positive number or null"),
        (dict(scale=float("nan")), "a positive number or null"),
        (dict(scale=float("inf")), "a positive number or null"),
        (dict(bias=1), "true or false"),
        (dict(kind=None), "a text"),
        (dict(layers=[1, 2]), "a list, each a positive whole number"),
        (dict(layers=(1, -2)), "a list, each a positive whole number"),
        (dict(windows=((3, "5"),)), "a list, each a list, each a positive whole number"),
    ],
    ids=str,
)
def test_a_field_of_another_type_is_named(change, kind):
    ((field, value),) = change.items()
    with pytest.raises(ValueError) as error:
        check_fields(Config(**change), "network")
    assert str(error.value) == f"network {field} {value!r} is not {kind}"
