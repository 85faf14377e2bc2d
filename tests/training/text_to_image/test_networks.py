"""The networks that a config names are opened; differences that no shape shows are told."""

import dataclasses

import pytest

from sana_jax.checkpoints import native
from sana_jax.runtime.errors import UserError
from sana_jax.text.instruction import Instruction
from sana_jax.training.text_to_image import networks
from sana_jax.training.text_to_image.networks import open_base
from sana_jax.training.text_to_image.run import TextToImageTraining
from tests.training.text_to_image.toy import load


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


def test_an_instruction_is_refused_where_the_text_encoder_trains(config, tmp_path, monkeypatch):
    base = native.open_folder(config.parent / "base")
    base.instruction = Instruction("describe: ", "a test")
    monkeypatch.setattr(networks, "open_checkpoint", lambda name: base)
    with pytest.raises(UserError, match="give config.text_encoder.instruction=False"):
        TextToImageTraining(load(config, text_encoder__train=True), str(tmp_path / "run"))


def test_a_start_of_the_same_shapes_and_another_meaning(config, caplog):
    start = str(config.parent / "base")
    networks.open_start(load(config, start=start))
    assert "clip_attention" not in caplog.text
    networks.open_start(load(config, start=start, network__clip_attention=True))
    assert "config.network.clip_attention=True, but None of" in caplog.text
