"""What a config says of values that cannot be."""

import dataclasses

import pytest

from sana_jax.models.config import (
    MAX_WIDTH,
    check_choices,
    check_fields,
    later,
    without_later,
)
from sana_jax.models.dc_ae_config import PER_STAGE, DCAEConfig
from sana_jax.models.dit import SanaConfig
from sana_jax.models.gemma2 import Gemma2Config


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 8
    depth: int = 2
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


@pytest.mark.parametrize(
    "change, limit",
    [
        (dict(width=10**9), "at most 262144"),
        (dict(depth=1001), "at most 1000"),
        (dict(layers=(1, 10**6)), "at most 262144"),
        (dict(windows=((3, 10**6),)), "at most 262144"),
        (dict(scale=1e300), "1e-12 .. 1e+12"),
        (dict(scale=10**400), "1e-12 .. 1e+12"),
        (dict(scale=5e-324), "1e-12 .. 1e+12"),
    ],
    ids=str,
)
def test_a_number_beyond_every_network_is_refused(change, limit):
    ((field, value),) = change.items()
    check_fields(Config(width=MAX_WIDTH, depth=1000, scale=10**6), "network", depth=1000)
    with pytest.raises(ValueError) as error:
        check_fields(Config(**change), "network", depth=1000)
    assert str(error.value) == f"network {field} {value!r} is beyond the limit, {limit}"


@pytest.mark.parametrize(
    "kind, change",
    [
        (SanaConfig, dict(depth=10**9)),
        (SanaConfig, dict(mlp_ratio=1e9)),
        (SanaConfig, dict(mlp_ratio=1e-9)),
        (SanaConfig, dict(patch_size=10**6)),
        (SanaConfig, dict(patch_size=64, sample_size=16)),
        (SanaConfig, dict(latent_channels=2**18, patch_size=2)),
        (SanaConfig, dict(sample_size=10**9)),
        (Gemma2Config, dict(num_layers=10**9)),
        (Gemma2Config, dict(num_heads=2**17, num_kv_heads=2**17)),
        (Gemma2Config, dict(vocab_size=10**9)),
        (Gemma2Config, dict(sliding_window=2**70)),
        (DCAEConfig, dict(encoder_layers=(2, 2, 2, 3, 3, 10**9))),
        (DCAEConfig, dict(decoder_layers=(20,) * 6)),
        (DCAEConfig, dict(encoder_qkv_multiscales=((),) * 5 + ((10**6 + 1,),))),
        (DCAEConfig, dict(encoder_qkv_multiscales=((),) * 5 + ((4,),))),
        (DCAEConfig, dict(decoder_qkv_multiscales=((),) * 5 + ((5,) * 9,))),
        (DCAEConfig, {f: (getattr(DCAEConfig(), f)[-1],) * 20 for f in PER_STAGE}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_networks_beyond_every_published_one_are_refused_before_they_are_built(kind, change):
    with pytest.raises(ValueError, match=f"{'|'.join(change)}"):
        kind(**change)


def test_a_choice_is_one_of_those_that_there_are():
    check_choices(Config(), "network", {"kind": ("plain", "other")})
    with pytest.raises(ValueError, match="network kind 'plain' is not one of this, that"):
        check_choices(Config(), "network", {"kind": ("this", "that")})


def test_a_later_field_is_written_only_where_it_is_not_its_default():
    @dataclasses.dataclass(frozen=True)
    class Later:
        width: int = 8
        kind: str = later("plain")

    assert without_later(Later, dataclasses.asdict(Later())) == {"width": 8}
    assert without_later(Later, {"kind": "other"}) == {"kind": "other"}
    assert Later(**without_later(Later, {"width": 9, "kind": "plain"})) == Later(9)
