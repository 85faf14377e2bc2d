"""The flags that commands share: defined where a command asks for them, and alike in all."""

from functools import partial

import pytest
from absl import flags

from sana_jax.checkpoints import flags as checkpoint_flags


@pytest.fixture
def defined(monkeypatch):
    """A registry of the test's own, where `define` puts its flags."""
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "DEFINE_string", partial(flags.DEFINE_string, flag_values=values))
    return values


def test_only_the_checkpoint_is_required(defined):
    for name in checkpoint_flags.HELP:
        checkpoint_flags.define(name)
    with pytest.raises(flags.IllegalFlagValueError, match="--checkpoint"):
        defined(["command", "--variant=bf16"])
    defined(["command", "--checkpoint=shapes"])
    assert defined.checkpoint == "shapes"
    assert defined.revision is None and defined.instruction_file is None


def test_loras_add_up(monkeypatch):
    values = flags.FlagValues()
    define = partial(flags.DEFINE_multi_string, flag_values=values)
    monkeypatch.setattr(flags, "DEFINE_multi_string", define)
    checkpoint_flags.define_lora()
    values(["command"])
    assert values.lora == []
    values(["command", "--lora=a:0.5", "--lora=b"])
    assert values.lora == ["a:0.5", "b"]


def test_a_flag_belongs_to_the_module_that_asks_for_it_and_none_is_there_before(defined):
    assert list(defined) == []
    checkpoint_flags.define("variant")
    assert [name for name in defined if name in checkpoint_flags.HELP] == ["variant"]
    assert defined.find_module_defining_flag("variant") == __name__
