"""The networks that a config names are opened; differences that no shape shows are told."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from flax import traverse_util

from sana_jax.checkpoints import native, random_weights
from sana_jax.checkpoints.components import place
from sana_jax.models.dit import SanaConfig
from sana_jax.runtime.errors import UserError
from sana_jax.sharding import make_mesh
from sana_jax.text.instruction import Instruction
from sana_jax.training.text_to_image import networks
from sana_jax.training.text_to_image.networks import open_base
from sana_jax.training.text_to_image.run import TextToImageTraining
from tests.training.text_to_image.toy import load

NORMED = "attention", "cross_attention"


def test_the_instruction_is_part_of_a_run(config, monkeypatch):
    """A diffusers folder has none, so it depends on the machine; a run keeps to its own."""
    key = "text_encoder.instruction"
    (_, without), read = open_base(load(config)), networks.open_checkpoint

    def told(name):
        found = read(name)
        return dataclasses.replace(found, instruction=Instruction("Draw: ", "a file"))

    monkeypatch.setattr(networks, "open_checkpoint", told)
    base, prints = open_base(load(config))
    assert without[key] == "" and prints[key] == base.instruction.sha256
    assert open_base(load(config, text_encoder__instruction=False))[1][key] == ""


@pytest.mark.parametrize("keep_mask, mask", [(False, "negative"), (True, "prompt")])
def test_a_model_asks_for_the_mask_that_it_was_trained_with(config, keep_mask, mask):
    base, _ = open_base(load(config, recipe__keep_mask=keep_mask))
    assert base.unconditional_mask == mask


def test_an_instruction_is_refused_where_the_text_encoder_trains(config, tmp_path, monkeypatch):
    base = native.open_folder(config.parent / "base")
    base.instruction = Instruction("describe: ", "a test")
    monkeypatch.setattr(networks, "open_checkpoint", lambda name: base)
    with pytest.raises(UserError, match="give config.text_encoder.instruction=False"):
        TextToImageTraining(load(config, text_encoder__train=True), str(tmp_path / "run"))


FOLLOW = dict(recipe__follow_start=True, recipe__int8=("forward",), text_encoder__train=False)
FITS = dict(network__head_dim=32, network__sample_size=16)


def test_the_start_that_is_followed_stays_beside_what_trains(config):
    start = str(config.parent / "base")
    with pytest.raises(UserError, match="config.start is missing: name the checkpoint to follow"):
        open_base(load(config, **FOLLOW))
    base, prints = open_base(load(config, start=start, **FITS, **FOLLOW))
    jax.tree.map(
        np.testing.assert_array_equal, base.params["dit"], native.open_folder(start).params["dit"]
    )
    assert "start" in prints
    assert "dit" not in open_base(load(config, start=start, text_encoder__train=False))[0].params


def test_a_start_of_the_same_shapes_and_another_meaning(config, caplog):
    start = str(config.parent / "base")
    networks.open_start(load(config, start=start))
    assert "clip_attention" not in caplog.text
    networks.open_start(load(config, start=start, network__clip_attention=True))
    assert "config.network.clip_attention=True, but None of" in caplog.text
    networks.open_start(load(config, start=start, network__attention="softmax"))
    assert "config.network.attention=softmax, but linear of" in caplog.text
    assert "noise.shift" not in caplog.text
    networks.open_start(load(config, start=start, recipe__noise__shift=1.0))
    assert "config.recipe.noise.shift=1, with which the model will draw, but 3 of" in caplog.text
    kept = dataclasses.replace(native.open_folder(start), unconditional_mask="prompt")
    networks.open_start(load(config, start=start, recipe__keep_mask=True), lambda name: kept)
    assert "keep_mask" not in caplog.text
    networks.open_start(load(config, start=start), lambda name: kept)
    assert "config.recipe.keep_mask=False, but True of" in caplog.text


def test_sprint_is_not_trained_on(config, tmp_path):
    """Neither as the network, nor as the start of one, nor below a LoRA."""
    sprint = random_weights.make(random_weights.TINY_SPRINT)
    native.save(sprint, tmp_path / "sprint")
    for changes in (
        dict(network__guidance_embedding=0.1),
        dict(start=str(tmp_path / "sprint")),
        dict(start=str(tmp_path / "sprint"), lora__rank=2),
    ):
        with pytest.raises(UserError, match="Sana-Sprint was distilled.*start from the model"):
            TextToImageTraining(load(config, **changes), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_norms_that_a_start_has_not_begin_at_one(config, caplog):
    start = str(config.parent / "base")
    plain = networks.open_start(load(config, start=start))
    now = load(config, start=start, network__qk_norm=True)
    normed = networks.open_start(now)
    network = networks.read_network(SanaConfig, now, "network")
    place(normed, network, "float32", make_mesh(devices=jax.devices()[:1]))  # as a training does
    assert f"{start} has no norms of queries and keys: they start at one" in caplog.text
    flat = traverse_util.flatten_dict(normed, sep="/")
    found = {f"blocks/{a}/{n}/scale" for a in NORMED for n in ("q_norm", "k_norm")}
    new = found & flat.keys()
    assert new == found and all((flat.pop(name) == np.ones((1, 32))).all() for name in new)
    jax.tree.map(np.testing.assert_array_equal, traverse_util.unflatten_dict(flat, "/"), plain)


def test_norms_go_on_from_those_of_the_start(config, tmp_path, caplog):
    base = native.open_folder(config.parent / "base")
    start = str(config.parent / "base")
    weights = networks.open_start(load(config, start=start, network__qk_norm=True))
    weights["blocks"]["attention"]["q_norm"]["scale"][:] = 2.0
    with_norms = dataclasses.replace(base.dit, qk_norm=True)
    native.save(
        dataclasses.replace(base, dit=with_norms, params={**base.params, "dit": weights}),
        tmp_path / "normed",
    )
    caplog.clear()
    changes = dict(start=str(tmp_path / "normed"))
    again = networks.open_start(load(config, network__qk_norm=True, **changes))
    assert "start at one" not in caplog.text
    assert (np.asarray(again["blocks"]["attention"]["q_norm"]["scale"]) == 2).all()
    with pytest.raises(UserError, match="normed does not have the weights of config.network"):
        networks.open_start(load(config, **changes))  # it has norms, the config has none


@pytest.mark.parametrize("stays", [dict(lora__rank=4), FOLLOW], ids=["lora", "followed"])
@pytest.mark.parametrize(
    "changed, told",
    [
        (dict(interpolation_scale=2.0), "2.0, but None"),
        (dict(sample_size=8), "8, but 16"),
        (dict(qk_norm=True), "True, but False"),
        (dict(attention="softmax"), "softmax, but linear"),
    ],
)
def test_a_start_that_stays_is_the_network_of_the_config(config, stays, changed, told):
    """A LoRA's file is read for the network as it is there; a velocity to follow is its own."""
    start, changed = str(config.parent / "base"), {f"network__{k}": x for k, x in changed.items()}
    same = FITS | dict(start=start) | stays
    networks.open_start(load(config, **same))
    (key,) = changed
    words = f"config.{key.replace('__', '.')}={told} of config.start={start}"
    with pytest.raises(UserError, match=re.escape(words)):
        networks.open_start(load(config, **same | changed))


@pytest.mark.parametrize("kind", ["lora", pytest.param("all weights", marks=pytest.mark.slow)])
def test_a_training_opens_its_start_once(config, tmp_path, monkeypatch, kind):
    """To open a native folder is to read, and to hash, each of its bytes."""
    opened, read = [], networks.open_checkpoint
    monkeypatch.setattr(networks, "open_checkpoint", lambda name: opened.append(name) or read(name))
    start = str(config.parent / "base")
    changes = dict(start=start, network__head_dim=32, network__sample_size=16)
    changes |= {"lora__rank": 4} if kind == "lora" else {}
    changes |= dict(recipe__steps=2, data__size=16, autoencoder=None)  # that of the start
    TextToImageTraining(load(config, **changes), str(tmp_path / "run")).run()
    assert opened == [start]


@pytest.mark.parametrize("change", [dict(depth=2), dict(width=64), dict(attention_bias=True)])
def test_norms_excuse_no_other_difference(config, change):
    start = str(config.parent / "base")
    changes = {f"network__{key}": value for key, value in change.items()}
    words = f"config.start={start} does not have the weights of config.network"
    with pytest.raises(UserError, match=re.escape(words)):
        networks.open_start(load(config, start=start, network__qk_norm=True, **changes))
