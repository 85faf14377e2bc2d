"""Every field that the installed libraries write is in a table, and is what the table says."""

import inspect

import diffusers
import pytest
import transformers

from sana_jax.checkpoints.diffusers_configs import (
    config_json,
    dc_ae_from_diffusers,
    gemma2_from_transformers,
    sana_from_diffusers,
)
from sana_jax.checkpoints.diffusers_fields import (
    AUTOENCODER,
    SCHEDULERS,
    TEXT_ENCODER,
    TRANSFORMER,
    check_supported,
)
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.models.dit import PRESETS, SanaConfig
from sana_jax.models.gemma2 import Gemma2Config

DIFFUSERS = {
    "SanaTransformer2DModel": TRANSFORMER,
    "AutoencoderDC": AUTOENCODER,
    **SCHEDULERS,
}
READERS = {
    "transformer": (TRANSFORMER, sana_from_diffusers, SanaConfig()),
    "autoencoder": (AUTOENCODER, dc_ae_from_diffusers, DCAEConfig()),
    "text encoder": (TEXT_ENCODER, gemma2_from_transformers, Gemma2Config()),
}
OLD = {"rope_scaling", "rope_theta", "torch_dtype", "cache_implementation", "hidden_act",
       "use_return_dict"}  # fmt: skip


def defaults(name: str) -> dict:
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {key: value.default for key, value in parameters.items() if key != "self"}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_every_field_of_diffusers_has_one_place(name):
    fields, theirs = DIFFUSERS[name], defaults(name)
    assert sorted(fields.names()) == sorted(theirs)
    for key, (default, *_) in fields.only.items():
        assert theirs[key] == default, key


def test_every_field_of_transformers_has_one_place():
    theirs = transformers.Gemma2Config().to_dict()
    names = TEXT_ENCODER.names()
    assert len({*names}) == len(names)
    # Of transformers 4 some fields are left.
    assert {key for key in theirs if key[0] != "_"} == {*names} - OLD - {"quantization_config"}
    for key, (default, *_) in TEXT_ENCODER.only.items():
        assert theirs.get(key) == default, key


def other(value):
    """Another value of the same kind, which a network can have or not."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2
    if isinstance(value, list):
        return [other(item) for item in value] or [3]
    return {"rope_theta": 5.0, "rope_type": "default"} if isinstance(value, dict) else "layer"


@pytest.mark.parametrize(
    "kind, field", [(kind, f) for kind, (fields, *_) in READERS.items() for f in fields.obeyed]
)
def test_an_obeyed_field_changes_the_network_or_is_refused(kind, field):
    _, read, config = READERS[kind]
    config = PRESETS["sana_sprint_1600m_1024"] if "guidance" in field else config
    contents = config_json(config)
    if field in ("rope_scaling", "rope_theta"):
        contents.pop("rope_parameters")
    value = {"rope_scaling": {}, "rope_theta": 1.0}.get(field, contents.get(field))
    assert field in contents or field in OLD
    try:
        found = read({**contents, field: other(value)})
    except ValueError:
        return
    assert found != config


@pytest.mark.parametrize("kind", READERS)
def test_a_harmless_field_changes_nothing_and_another_is_named(kind, caplog):
    fields, read, config = READERS[kind]
    contents = config_json(config)
    harmless = [name for some in fields.harmless.values() for name in some]
    assert read({**contents, **dict.fromkeys(harmless, 0.5)}) == config
    assert caplog.text == ""
    assert read({**contents, "of_a_newer_library": 1}) == config
    assert f"{kind}: fields that are not known here are ignored: of_a_newer" in caplog.text
    for name in fields.only:
        with pytest.raises(ValueError, match=f"^{kind} {name} 'other' is not supported"):
            read({**contents, name: "other"})


def test_a_field_with_one_value_has_its_default_where_it_is_left_out():
    fields = SCHEDULERS["DPMSolverMultistepScheduler"]
    check_supported("with", fields, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"})
    with pytest.raises(ValueError, match="with use_flow_sigmas False is not supported, only True"):
        check_supported("with", fields, {"prediction_type": "flow_prediction"})
