"""The command: what it refuses before it starts. Whole runs: training/autoencoder/test_run.py."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.seeds=1", "unknown key --config.seeds"),
        ("--workdir=gs://bucket/run", "gs://bucket/run"),
    ],
)
def test_bad_flag_is_one_line_and_status_2(tmp_path, argument, message):
    line = [sys.executable, "-m", "sana_jax.train_dc_ae", f"--workdir={tmp_path / 'run'}"]
    line += [f"--config={ROOT}/configs/dc_ae_shapes.py", "--compilation_cache=", argument]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
