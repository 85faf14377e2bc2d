"""The ladder of full-size configs: what each says, and that a stage starts from the one before.

tests/golden/configs/ has every key and value of each, so that a change of a preset or a helper
shows what it does to them. Where it was meant, python -m tests.test_configs writes them again.
"""

import ast
import json
import runpy
from pathlib import Path

import pytest
from flax import traverse_util

from sana_jax.checkpoints.components import Checkpoint
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.models.dit import SanaConfig
from sana_jax.runtime.errors import UserError
from sana_jax.training.text_to_image import networks
from sana_jax.training.text_to_image.networks import open_start, read_network

CONFIGS = Path(__file__).parents[1] / "configs"
GOLDEN = Path(__file__).parent / "golden" / "configs"
FULL = "sana*.py", "sprint_*00m_*.py"
NAMES = sorted(path.stem for pattern in FULL for path in CONFIGS.glob(pattern))
BEFORE = {  # stage -> the stage that it starts from
    "sana_600m_1024": "sana_600m_512",
    "sana_1600m_1024": "sana_1600m_512",
    "sana_1600m_2048": "sana_1600m_1024",
    "sana_1600m_4096": "sana_1600m_2048",
    "sana1.5_1600m_1024": "sana_1600m_1024",
}
GROWN = {"sana1.5_4800m_1024": "sana1.5_1600m_1024"}  # by convert --grow, which adds blocks
DISTILLED = {"sprint_600m_1024": "sana_600m_1024", "sprint_1600m_1024": "sana_1600m_1024"}


def load(name):
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()


def flat(name):
    """Dotted key -> value, as JSON has it."""
    values = traverse_util.flatten_dict(load(name).to_dict(), sep=".")
    return json.loads(json.dumps(dict(sorted(values.items()))))


@pytest.mark.parametrize("name", NAMES)
def test_a_config_has_the_keys_and_values_of_its_golden_copy(name):
    assert flat(name) == json.loads((GOLDEN / f"{name}.json").read_text())


def test_every_golden_copy_has_a_config():
    assert sorted(path.stem for path in GOLDEN.glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_config_tells_the_command_that_trains_it(name):
    told = ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text()))
    told = " ".join(told.split())
    assert f"python -m sana_jax.train --config=configs/{name}.py " in told
    assert ("--config.start=" in told) == (name in BEFORE | GROWN | DISTILLED)
    before = (BEFORE | GROWN | DISTILLED).get(name)
    assert before is None or f"{before}.py" in told
    assert "has not been run" in told


@pytest.fixture
def start_from(monkeypatch):
    """Opens the start of a stage where the checkpoint has the network of another, and no weight."""

    def opened(config, network):
        found = Checkpoint(vae=DCAEConfig(), dit=network, params={"dit": {}})
        monkeypatch.setattr(networks, "open_checkpoint", lambda name: found)
        config.start = "RUN/model"
        return open_start(config)

    return opened


def network_of(config):
    return read_network(SanaConfig, config, "network")


@pytest.mark.parametrize("name", BEFORE)
def test_a_stage_starts_from_the_one_before(name, start_from):
    before, config = network_of(load(BEFORE[name])), load(name)
    new = traverse_util.flatten_dict(start_from(config, before), sep="/")
    assert bool(new) == (config.network.qk_norm and not before.qk_norm)
    assert all(path.endswith(("q_norm/scale", "k_norm/scale")) for path in new)


def test_the_grown_stage_takes_only_a_grown_start(start_from):
    (name,), (before,) = GROWN.keys(), GROWN.values()
    smaller, config = network_of(load(before)), load(name)
    with pytest.raises(UserError, match="does not have the weights of config.network"):
        start_from(config, smaller)
    assert start_from(config, network_of(config)) == {}


@pytest.mark.parametrize("other", ["sana_1600m_512", "sana_1600m_4096"])
def test_a_stage_of_another_width_is_refused(other, start_from):
    with pytest.raises(UserError, match="does not have the weights of config.network"):
        start_from(load(other), network_of(load("sana_600m_512")))


def test_the_fields_that_make_a_smaller_model_at_more_pixels(start_from):
    """As configs/README.md says: a 0.6B at 2048 px, which is not published."""
    config, smaller = load("sana_1600m_2048"), network_of(load("sana_600m_1024"))
    config.network.update(depth=28, width=1152, cross_heads=16)
    assert start_from(config, smaller) == {}


def write():
    GOLDEN.mkdir(exist_ok=True)
    for name in NAMES:
        (GOLDEN / f"{name}.json").write_text(json.dumps(flat(name), indent=1) + "\n")


if __name__ == "__main__":
    write()
