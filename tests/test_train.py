"""The command: what it refuses before it starts. Whole runs: training/text_to_image/test_run.py."""

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
