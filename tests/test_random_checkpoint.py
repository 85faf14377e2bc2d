"""Random checkpoints: loadable in both layouts, and a failed command leaves nothing behind."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from sana_jax.checkpoints import random_weights
from sana_jax.checkpoints.load import open_checkpoint


def write(*flags):
    command = [sys.executable, "-m", "sana_jax.random_checkpoint", *flags]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("layout", ["native", "diffusers"])
def test_both_layouts_hold_the_same_weights(tmp_path, layout):
    result = write(f"--out={tmp_path / 'c'}", f"--format={layout}", "--max_shard_mb=1")
    assert result.returncode == 0, result.stderr
    found = open_checkpoint(str(tmp_path / "c"))
    expected = random_weights.make("tiny")
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert found.dit == expected.dit and found.vae == expected.vae
    assert found.text_encoder == expected.text_encoder


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--preset=sana_9b"], "preset 'sana_9b' is not one of tiny, tiny_sprint, sana_600m_512"),
        (["--seed=-1"], "--seed"),
        (["--dtype=int8"], "--dtype"),
        (["--sed=1"], "did you mean --seed?"),
    ],
)
def test_bad_flags(tmp_path, flags, words):
    result = write(f"--out={tmp_path / 'c'}", *flags)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert words in result.stderr and not (tmp_path / "c").exists()


def test_an_occupied_folder_is_kept(tmp_path):
    (tmp_path / "mine").write_text("keep me")
    result = write(f"--out={tmp_path}")
    assert result.returncode == 2 and "not an empty folder" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_failed_run_leaves_nothing(tmp_path):
    """Here for want of a place; a full disk takes the same way."""
    result = write("--out=/proc/nowhere/c")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    limited = f"ulimit -f 100; {sys.executable} -m sana_jax.random_checkpoint --out={tmp_path}/a/b"
    result = subprocess.run(["bash", "-c", limited], capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "File too large" in result.stderr and not any(tmp_path.iterdir())
