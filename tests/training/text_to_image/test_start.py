"""What a config leaves open comes from its start and the devices; what it states stays."""

import dataclasses
import re

import jax
import pytest

from sana_jax.checkpoints import diffusers, native
from sana_jax.checkpoints.components import Checkpoint
from sana_jax.checkpoints.find import bundled
from sana_jax.models.dit import SanaConfig
from sana_jax.runtime.errors import UserError
from sana_jax.sharding import make_mesh
from sana_jax.training.text_to_image import start
from sana_jax.training.text_to_image.recipe import text_to_image
from sana_jax.training.text_to_image.start import leave_open, resolve, stand_in
from tests.training.text_to_image.toy import load


def opened(**changes):
    config = leave_open(text_to_image(SanaConfig(), steps=4, batch_size=4))
    changes = dict(start="shapes", data__source="photos") | changes
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


@pytest.fixture(scope="module", params=["native", "diffusers", "shapes"])
def named(request, config, tmp_path_factory):
    """A checkpoint's name, and what is in it."""
    if request.param == "shapes":
        return "shapes", native.open_folder(bundled()["shapes"])
    folder = config.parent / "base"
    made = native.open_folder(folder)
    if request.param == "diffusers":
        folder = tmp_path_factory.mktemp("diffusers")
        diffusers.save(made, folder)
        made = diffusers.open_folder(folder)
    return str(folder), made


def test_networks_text_and_shift_are_those_of_the_checkpoint(named):
    name, checkpoint = named
    found = resolve(opened(start=name))
    network = {key: value for key, value in found.network.items() if key != "implementation"}
    assert network == dataclasses.asdict(checkpoint.dit)
    assert found.autoencoder == found.text_encoder.checkpoint == name
    assert found.text_encoder.rows == checkpoint.text_rows
    assert found.recipe.noise.shift == checkpoint.flow_shift
    assert found.dtype == "float32"  # on a CPU
    assert found.data.size is None and not found.data.buckets
    assert found.network.implementation == "auto"


def test_what_the_config_states_wins(config):
    stated = dict(text_encoder__rows=9, recipe__noise__shift=2.0, network__qk_norm=True)
    stated |= dict(autoencoder="mine", text_encoder__checkpoint="theirs", dtype="bfloat16")
    stated |= dict(recipe__batch_size=32, recipe__microbatches=2, data__buckets=False)
    stated |= dict(images__prompts=("a cat",), data__caption="a dog")
    given = opened(start=str(config.parent / "base"), **stated)
    found = resolve(given)
    for key, value in stated.items():
        at = found
        for part in key.split("__"):
            at = at[part]
        assert at == value, key
    assert found.network.width == 32
    assert given.network.width is None  # the config that is given stays


def test_a_config_that_states_all_does_not_open_its_start(config):
    plain = load(config, start="gone")
    assert resolve(plain).to_dict() == plain.to_dict()
    # One that names no autoencoder has it from its start.
    plain = load(config, start=str(config.parent / "base"), autoencoder=None)
    assert resolve(plain).autoencoder == plain.start


@pytest.mark.parametrize(
    "devices, changes, batch, microbatches",
    [
        (1, {}, 4, 4),
        (2, {}, 4, 2),
        (8, {}, 8, 1),
        (1, dict(prior__prompt="a dog"), 8, 8),
        (8, dict(prior__prompt="a dog"), 8, 1),
        (3, dict(prior__prompt="a dog"), 12, 4),
        (2, dict(recipe__batch_size=32), 32, 16),
        (2, dict(recipe__batch_size=32, recipe__encoder_microbatches=4), 32, 4),
        (8, dict(mesh__fsdp=2, mesh__tensor=4), 4, 2),
        (1, dict(recipe__microbatches=2), 4, 2),
    ],
    ids=str,
)
def test_a_device_has_one_picture_at_a_time(monkeypatch, devices, changes, batch, microbatches):
    found = jax.devices()[:devices]
    monkeypatch.setattr(jax, "devices", lambda *a: found)
    recipe = resolve(opened(**changes)).recipe
    assert (recipe.batch_size, recipe.microbatches) == (batch, microbatches)


def test_pictures_are_drawn_of_a_caption_that_is_the_same_for_all():
    assert resolve(opened(data__caption="a dog")).images.prompts == ("a dog",)
    assert resolve(opened(data__caption="a {name}")).images.prompts is None


def test_buckets_are_used_where_the_size_has_some(config, monkeypatch):
    base = str(config.parent / "base")  # 64 px
    monkeypatch.setattr(start, "BASES", (64, 512))
    assert resolve(opened(start=base)).data.buckets is True
    assert resolve(opened(start=base, data__size=32)).data.buckets is False
    for source, kept in ("precomputed:here", True), ("tfds:coco", True), ("shapes", False):
        assert resolve(opened(start=base, data__source=source)).data.buckets is kept


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(start=None), "config.start is missing: name the checkpoint to train, such as shapes"),
        (dict(data__source=None), "config.data.source is missing: name the folder of pictures"),
        (dict(start="nowhere"), "no checkpoint 'nowhere'"),
        (dict(start="autoencoder"), "config.start=autoencoder: this checkpoint has no transformer"),
    ],
    ids=str,
)
def test_what_has_to_be_named_is_told(config, monkeypatch, changes, message):
    monkeypatch.chdir(config.parent)
    with pytest.raises(UserError, match=re.escape(message)):
        resolve(opened(**changes))


def test_a_step_is_compiled_ahead_for_networks_that_are_not_there():
    mesh = make_mesh(devices=jax.devices()[:4])
    found = stand_in(opened(start=None, data__source=None, recipe__batch_size=16), mesh)
    assert SanaConfig(**{f: v for f, v in found.network.items() if f != "implementation"}) == (
        SanaConfig()
    )
    assert (found.text_encoder.rows, found.recipe.noise.shift) == (
        Checkpoint.text_rows,
        Checkpoint.flow_shift,
    )
    assert (found.recipe.microbatches, found.dtype) == (4, "bfloat16")
