"""Two checkpoints have two fingerprints; a copy has the same."""

import shutil

import numpy as np
import pytest

from sana_jax import random_checkpoint
from sana_jax.checkpoints import diffusers
from sana_jax.checkpoints.fingerprint import fingerprint
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
    found = [fingerprint(tmp_path / name) for name in ("0", "1", "copy")]
    assert found[0] == found[2] != found[1]


def test_every_file_of_a_diffusers_folder_counts(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text("a page")
    seen = {fingerprint(folder)}
    assert fingerprint(copy) in seen
    files = [p for p in sorted(folder.rglob("*.*")) if p.name != "model_index.json"]
    assert {p.suffix for p in files} == {".json", ".safetensors"} and len(files) >= 8
    for i, path in enumerate(files, 1):
        content = np.frombuffer(path.read_bytes(), np.uint8).copy()
        content[-64:] ^= 1  # of the last tensor
        (copy / path.relative_to(folder)).write_bytes(content.tobytes())
        seen.add(fingerprint(copy))
        assert len(seen) == i + 1, path


def test_large_files_are_sampled(tmp_path):
    (tmp_path / "vae").mkdir()
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    content = np.random.default_rng(0).integers(0, 256, 4 * 2**20, np.uint8)
    content[:8] = np.frombuffer((1000).to_bytes(8, "little"), np.uint8)
    path.write_bytes(content.tobytes())
    before = fingerprint(tmp_path)
    content[2**20 : 2**20 + 2**15] ^= 1
    path.write_bytes(content.tobytes())
    assert fingerprint(tmp_path) != before
    path.write_bytes(b"\xff" * 8)  # a header of 2**64 bytes
    assert fingerprint(tmp_path) != before
