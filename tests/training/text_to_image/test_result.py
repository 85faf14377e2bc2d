"""The model of a training is read from its newest checkpoint that is whole."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sana_jax.checkpoints import diffusers, native
from sana_jax.runtime.errors import UserError
from sana_jax.training.text_to_image import result
from sana_jax.training.text_to_image.result import open_workdir

ROOT = Path(__file__).parents[3]


def damage(workdir, step):
    """Flips a bit in every file that holds numbers of a checkpoint."""
    for path in (workdir / f"checkpoints/{step}/state").rglob("d/*"):
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)


def test_a_start_that_was_followed_may_be_gone(unbroken, monkeypatch, tmp_path):
    document, trained = result.read_newest(unbroken, "ema")
    document["config"]["recipe"]["follow_start"] = True
    document["config"]["start"] = str(tmp_path / "gone")
    document["config"]["fingerprints"]["start"] = "of what is gone"
    monkeypatch.setattr(result, "read_newest", lambda *_: (document, trained))
    found, expected = open_workdir(unbroken), native.open_folder(unbroken / "model")
    kernels = (np.asarray(x.params["dit"]["proj_out"]["kernel"]) for x in (found, expected))
    np.testing.assert_array_equal(*kernels)


def test_convert_reads_the_folder_and_falls_back(unbroken, config, tmp_path):
    workdir, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(unbroken, workdir)
    damage(workdir, 20)
    base = config.parent / "base"
    base.rename(config.parent / "moved")
    arguments = [f"--source={workdir}", f"--out={out}", "--ema"]
    command = [sys.executable, "-m", "sana_jax.convert", *arguments]
    with pytest.raises(UserError, match="no checkpoint '.*/base'.*rest"):
        open_workdir(workdir)
    try:
        rest = f"--rest={config.parent / 'moved'}"
        done = subprocess.run([*command, rest], cwd=ROOT, capture_output=True, text=True)
        with pytest.raises(UserError, match="config.autoencoder of .* is not what it was"):
            open_workdir(workdir, rest=str(unbroken / "model"))
    finally:
        (config.parent / "moved").rename(base)
    assert done.returncode == 0, done.stderr
    assert "step 15 is used" in done.stderr
    model = native.open_folder(out)
    assert (model.provenance["steps"], model.provenance["ema"]) == (15, True)
    assert (workdir / "checkpoints/20").exists()  # converting changes nothing
    trained = open_workdir(workdir, ema=False)
    last = load_file(unbroken / "model/dit.safetensors")["proj_out/kernel"]
    average = load_file(out / "dit.safetensors")["proj_out/kernel"]
    plain = np.asarray(trained.params["dit"]["proj_out"]["kernel"])
    assert len({array.tobytes() for array in (last, average, plain)}) == 3
    command[-2:] = f"--out={tmp_path / 'theirs'}", "--format=diffusers"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = diffusers.open_folder(tmp_path / "theirs")
    np.testing.assert_array_equal(theirs.params["dit"]["proj_out"]["kernel"], plain)
