"""Two checkpoints have two hashes; a copy has the same."""

import shutil

import numpy as np
import pytest

from sana_jax import random_checkpoint
from sana_jax.checkpoints import diffusers
from sana_jax.checkpoints.find import checkpoint_hash, file_sha256, find, find_lora
from sana_jax.runtime.errors import UserError
from tests import mini


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    diffusers.save(random_checkpoint.make("tiny"), path)
    return path


def test_native_folder(tmp_path):
    for seed in 0, 1:
        mini.save(tmp_path / str(seed), seed)
    shutil.copytree(tmp_path / "0", tmp_path / "copy")
    found = [checkpoint_hash(tmp_path / name) for name in ("0", "1", "copy")]
    assert found[0] == found[2] != found[1]


def test_every_file_of_a_diffusers_folder_counts(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text("a page")
    seen = {checkpoint_hash(folder)}
    assert checkpoint_hash(copy) in seen
    files = [p for p in sorted(folder.rglob("*.*")) if p.name != "model_index.json"]
    assert {p.suffix for p in files} == {".json", ".safetensors"} and len(files) >= 8
    for i, path in enumerate(files, 1):
        content = np.frombuffer(path.read_bytes(), np.uint8).copy()
        content[-64:] ^= 1  # of the last tensor
        (copy / path.relative_to(folder)).write_bytes(content.tobytes())
        seen.add(checkpoint_hash(copy))
        assert len(seen) == i + 1, path


def test_every_byte_counts(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    before, weights = checkpoint_hash(copy), copy / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 3] ^= 1
    weights.write_bytes(content)
    assert checkpoint_hash(copy) != before


def test_files_of_another_variant_do_not_count(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    before, vae = checkpoint_hash(copy), copy / "vae"
    plain, half = (vae / f"diffusion_pytorch_model{v}.safetensors" for v in ("", ".bf16"))
    half.write_bytes(plain.read_bytes() + b" ")
    assert checkpoint_hash(copy) == before != checkpoint_hash(copy, "bf16")


def test_shards_count(tmp_path):
    diffusers.save(random_checkpoint.make("tiny"), tmp_path, max_shard_bytes=200_000)
    before, shards = checkpoint_hash(tmp_path), sorted(tmp_path.glob("transformer/*-of-*"))
    assert len(shards) > 1
    shards[-1].write_bytes(shards[-1].read_bytes()[:-1] + b"\x01")
    assert checkpoint_hash(tmp_path) != before


def test_links_of_the_hub_cache_are_not_read(tmp_path):
    """A large file there has its sha256 as its name."""
    blob = tmp_path / ("ab" * 32)
    blob.write_bytes(b"x")
    (tmp_path / "link").symlink_to(blob)
    assert file_sha256(tmp_path / "link") == "ab" * 32
    assert file_sha256(blob) != "ab" * 32


def hub_cache(root, *commits, marker="model_index.json"):
    """The folders that huggingface_hub makes for a repository."""
    cached = root / "models--org--name"
    for commit in commits:
        (cached / "snapshots" / commit).mkdir(parents=True)
        (cached / "snapshots" / commit / marker).write_text("{}")
    (cached / "refs").mkdir(parents=True)
    return cached


def test_the_hub_caches_folder_stands_for_its_only_snapshot(tmp_path):
    cached = hub_cache(tmp_path, "0123")
    (cached / "snapshots" / "4567").mkdir()  # its download never began
    for given in cached, cached / "snapshots", cached / "snapshots" / "0123":
        assert find(str(given)) == cached / "snapshots" / "0123"


@pytest.mark.parametrize("commits", [(), ("0123", "4567")])
def test_of_several_snapshots_one_has_to_be_given(tmp_path, commits):
    cached = hub_cache(tmp_path, *commits)
    (cached / "snapshots").mkdir(exist_ok=True)
    told = " or ".join(str(cached / "snapshots" / commit) for commit in commits)
    with pytest.raises(UserError, match=f"give {told}$" if told else "no whole snapshot.*org/name"):
        find(str(cached))


def layout(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("{}")


@pytest.mark.parametrize(
    "files, given, words",
    [
        (["model_index.json", "scheduler/a.json"], "scheduler", "give {root}$"),
        (["model_index.json", "vae/a.safetensors"], "vae/a.safetensors", "the folder {root}$"),
        (["model.json", "dit.safetensors"], "dit.safetensors", "the folder {root}$"),
        (["model/model.json", "checkpoints/0/x"], ".", "give {root}/model$"),
        (["checkpoints/0/x"], ".", "convert it first, .*--source={root}/. --out"),
        (["checkpoints/Sana.pth"], ".", "--source={root}/checkpoints/Sana.pth --rest"),
        (["transformer/config.json"], ".", "its transformer first, .*--source={root}/. --rest"),
        (["a/model_index.json", "b/model.json"], ".", "give {root}/a or {root}/b$"),
        (["Sana.pth"], "Sana.pth", "has to be converted.*--rest"),
        (["tune.safetensors"], "tune.safetensors", "has to be converted.*--rest"),
        (
            ["pytorch_lora_weights.safetensors"],
            ".",
            "but a LoRA: give the checkpoint that it is of, and this by --lora={root}/.$",
        ),
        (["a.zip"], "a.zip", "is a file; name the folder"),
        (["a"], ".", "nor model_index.json .diffusers.$"),
    ],
)
def test_what_to_give_instead_is_said(tmp_path, files, given, words):
    layout(tmp_path, *files)
    with pytest.raises(UserError, match=words.format(root=tmp_path)):
        find(f"{tmp_path}/{given}")


def test_a_page_of_the_hub_is_answered_with_its_id():
    for page in "https://huggingface.co/org/name", "https://hf.co/org/name/tree/main?x=1":
        with pytest.raises(UserError, match="give the id alone, org/name$"):
            find(page)
    with pytest.raises(UserError, match="read from local folders"):
        find("gs://bucket/name")


@pytest.mark.parametrize("name", ["", "a\0b", "caf\udce9", None])
def test_what_names_nothing_is_refused(name):
    with pytest.raises(UserError, match="path|not UTF-8|null character|named by a text"):
        find(name)
    with pytest.raises(UserError, match="revision 5 is no text"):
        find("org/name", revision=5)


def test_a_lora_is_a_file_or_that_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, other = tmp_path / "folder", tmp_path / "other"
    for path in folder / "pytorch_lora_weights.safetensors", other / "mine.safetensors":
        path.parent.mkdir()
        path.touch()
        assert find_lora(str(path)) == path
    assert find_lora("folder").name == "pytorch_lora_weights.safetensors"
    with pytest.raises(UserError, match="give .*mine.safetensors"):
        find_lora(str(other))
    folder.rename(other / "model")
    with pytest.raises(UserError, match="give .*mine.safetensors or .*model/pytorch_lora_weights"):
        find_lora(str(other))


@pytest.mark.parametrize(
    "name", ["absent", "a/b.safetensors", "./a/b", "other/b", "/no/such", "", 3]
)
def test_what_is_no_lora_is_refused_before_the_hub_is_asked(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="no LoRA|path"):
        find_lora(name)
