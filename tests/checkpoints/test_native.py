"""Native folders: exact in both directions, and damage is named."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from diffusers import SanaPipeline as TheirPipeline

from sana_jax.checkpoints import diffusers, native
from sana_jax.models.dit import VARIANTS
from sana_jax.runtime.errors import UserError
from tests import mini, toy
from tests.checkpoints.folders import assert_same, edit_json, load_on_one_device


def test_native_round_trip(written, tmp_path):
    """diffusers -> native -> diffusers: the same weights to the bit, and diffusers loads them."""
    first = load_on_one_device(written)
    native.save(first, tmp_path / "native", max_shard_bytes=100_000)
    assert (tmp_path / "native" / "dit.safetensors.index.json").is_file()
    second = load_on_one_device(tmp_path / "native")
    assert_same(second, first)
    for name in ("dit", "vae", "text_encoder", "flow_shift", "text_rows", "instruction"):
        assert getattr(second, name) == getattr(first, name), name
    diffusers.save(second, tmp_path / "diffusers", max_shard_bytes=100_000)
    assert_same(load_on_one_device(tmp_path / "diffusers"), first)
    their = TheirPipeline.from_pretrained(tmp_path / "diffusers")
    again = toy.params(their.transformer, first.dit)
    jax.tree.map(np.testing.assert_array_equal, again, first.params["dit"])


def test_a_variant_is_kept_and_no_diffusers_folder_is_written_of_it(tmp_path):
    """Of SANA's own network, model.json does not name the fields at all."""
    mini.save(tmp_path / "own")
    own = native.open_folder(tmp_path / "own")
    assert VARIANTS.keys().isdisjoint(json.loads((tmp_path / "own/model.json").read_text())["dit"])
    dit = dataclasses.replace(own.dit, attention="softmax", objective="ddpm")
    changed = dataclasses.replace(own, dit=dit)
    native.save(changed, tmp_path / "changed")
    assert native.open_folder(tmp_path / "changed").dit == dit
    with pytest.raises(UserError, match="with attention=softmax, objective=ddpm: keep it native"):
        diffusers.save(changed, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_the_mask_without_the_prompt_is_kept_where_it_is_not_the_usual_one(
    written, tmp_path, caplog
):
    own = load_on_one_device(written)
    native.save(dataclasses.replace(own, unconditional_mask="prompt"), tmp_path / "native")
    assert native.open_folder(tmp_path / "native").unconditional_mask == "prompt"
    diffusers.save(native.open_folder(tmp_path / "native"), tmp_path / "diffusers")
    assert "diffusers draws with the negative prompt's" in caplog.text
    native.save(own, tmp_path / "own")
    sampler = json.loads((tmp_path / "own/model.json").read_text())["sampler"]
    assert sampler == {"flow_shift": 3.0, "text_rows": 300}
    assert native.open_folder(tmp_path / "own").unconditional_mask == "negative"


def test_damaged_native_folder(written, tmp_path):
    native.save(load_on_one_device(written), tmp_path / "native")
    weights = tmp_path / "native" / "dit.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="dit.safetensors is damaged"):
        load_on_one_device(tmp_path / "native")
    weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="dit.safetensors is a git-LFS pointer"):
        load_on_one_device(tmp_path / "native")
    native.save(load_on_one_device(written), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "dit.safetensors", weights)
    load_on_one_device(tmp_path / "native")
    shutil.copy(weights, tmp_path / "native" / "extra.safetensors")
    with pytest.raises(UserError, match="extra.safetensors is not in model.json"):
        load_on_one_device(tmp_path / "native")
    (tmp_path / "native" / "extra.safetensors").unlink()
    edit_json(tmp_path / "native" / "model.json", version=2)
    with pytest.raises(UserError, match="version 2"):
        load_on_one_device(tmp_path / "native")


@pytest.mark.parametrize(
    "changes",
    [
        dict(files=None),
        dict(files=["a"]),
        dict(files={}),
        dict(files={"../outside": "0"}),
        dict(sampler=...),
        dict(sampler=dict(flow_shift="3", text_rows=300)),
        dict(sampler=dict(flow_shift=3.0, text_rows=0)),
        dict(sampler=dict(flow_shift=3.0, text_rows=300, unconditional_mask="none")),
        dict(instruction=dict(text=5, source="x", sha256="y")),
        dict(instruction=dict(text="a", source="x", sha256="y")),
        dict(dit=dict(depth="2")),
        dict(dit=dict(no_such_field=2)),
        dict(format="other"),
        dict(provenance=["a"]),
        dict(files={"a" * 300: "0"}),
        dict(files={"a\0b": "0"}),
        dict(dit=[]),
        dict(dit=dict(depth=10**9)),
        dict(text_encoder=dict(num_layers=10**9)),
        dict(sampler=dict(flow_shift=10**400, text_rows=300)),
        dict(sampler=dict(flow_shift=1e300, text_rows=300)),
        dict(sampler=dict(flow_shift=3.0, text_rows=10**12)),
        dict(sampler=[3.0, 300]),
    ],
)
def test_broken_model_json(written, tmp_path, changes):
    native.save(load_on_one_device(written), tmp_path / "native")
    edit_json(tmp_path / "native" / "model.json", **changes)
    with pytest.raises(UserError, match="model.json"):
        load_on_one_device(tmp_path / "native")


@pytest.fixture
def beside(tmp_path):
    """A folder, and one beside it with another transformer and the same other files."""
    mini.save(tmp_path / "first")
    native.save(native.open_folder(tmp_path / "first"), tmp_path / "teacher")
    teacher = native.open_folder(tmp_path / "teacher")
    move = jax.tree.map(lambda x: np.asarray(x) + 1, teacher.params["dit"])
    student = dataclasses.replace(teacher, params={**teacher.params, "dit": move})
    native.save(student, tmp_path / "student", share=tmp_path / "teacher")
    return tmp_path, student


def test_a_folder_shares_the_files_that_another_has_too(beside):
    folder, student = beside
    files = {path.name for path in (folder / "student").iterdir()}
    assert files == {"model.json", "dit.safetensors"}
    model = json.loads((folder / "student/model.json").read_text())
    assert model["shared"]["folder"] == "../teacher" and list(model["files"]) == ["dit.safetensors"]
    found = native.open_folder(folder / "student")
    assert_same(found, student)
    assert found.tokenizer is not None and native.is_whole(folder / "student")
    native.save(found, folder / "whole")
    assert_same(native.open_folder(folder / "whole"), student)
    with pytest.raises(UserError, match="has files of ../teacher: share those of that folder"):
        native.save(found, folder / "third", share=folder / "student")


def test_a_part_of_several_files_is_shared_whole_or_not_at_all(beside):
    """Two networks of one shape have the same index, and may have some shards alike."""
    folder, student = beside
    most = dict(max_shard_bytes=20_000)
    native.save(native.open_folder(folder / "first"), folder / "parts", **most)
    dit = dict(native.open_folder(folder / "first").params["dit"])
    dit["proj_out"] = student.params["dit"]["proj_out"]
    changed = dataclasses.replace(student, params={**student.params, "dit": dit})
    native.save(changed, folder / "changed", **most, share=folder / "parts")
    files = {path.name.partition("-")[0] for path in (folder / "changed").glob("*.safetensors")}
    assert files == {"dit"}
    assert_same(native.open_folder(folder / "changed"), changed)


def test_shared_files_that_are_gone_or_others_are_named(beside):
    folder, _ = beside
    (folder / "teacher").rename(folder / "away")
    with pytest.raises(UserError, match="teacher, which is not there: put it back"):
        native.open_folder(folder / "student")
    assert not native.is_whole(folder / "student")
    (folder / "away").rename(folder / "teacher")
    weights = folder / "teacher/vae.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match="vae.safetensors is not what .*student shared with it"):
        native.open_folder(folder / "student")
    assert not native.is_whole(folder / "student")
    weights.unlink()
    with pytest.raises(UserError, match="vae.safetensors is missing"):
        native.open_folder(folder / "student")


@pytest.mark.parametrize(
    "shared",
    [[], {}, {"folder": "../teacher"}, {"folder": "../teacher", "files": {"../x": "0"}}],
    ids=str,
)
def test_broken_sharing(beside, shared):
    edit_json(beside[0] / "student/model.json", shared=shared)
    with pytest.raises(UserError, match="model.json"):
        native.open_folder(beside[0] / "student")
