"""The command: what it refuses before it starts. Whole runs: training/text_to_image/test_run.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--config.recipe.optimiser.name=came"],
            "unknown key --config.recipe.optimiser.name; did",
        ),
        (["--config.recipe.batch_size=many"], "config.recipe.batch_size"),
        ([], "config.autoencoder is missing"),
    ],
    ids=str,
)
def test_bad_flag_is_one_line_and_status_2(tmp_path, arguments, message):
    line = [sys.executable, "-m", "sana_jax.train", f"--workdir={tmp_path / 'run'}"]
    line += [f"--config={ROOT}/configs/sana_600m_512.py", *arguments]
    line += ["--config.mesh.replica=1", "--config.mesh.fsdp=-1", "--compilation_cache="]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.data.source=empty"], "error: empty: no image in it or below"),
        (["--config.data.captoin=a dog"], "did you mean --config.data.caption?"),
        (["--config.data.source=one", "--config.data.caption=a {dog}"], "{dog} is no field;"),
        (["--config.data.source=one"], "a.png cannot be used: not_an_image"),
        (["--config.data.source=empty", "--config.prior.weight=2"], "config.prior.prompt is missi"),
    ],
    ids=str,
)
def test_a_fine_tuning_that_cannot_be_is_one_line_and_status_2(tmp_path, arguments, message):
    for name in "one", "empty":
        (tmp_path / name).mkdir()
    (tmp_path / "one/a.png").write_text("<html>")
    line = [sys.executable, "-m", "sana_jax.train", "--workdir=run", "--compilation_cache="]
    line += [f"--config={ROOT}/configs/finetune.py", "--config.start=shapes", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
