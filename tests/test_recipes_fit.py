"""The full-size recipes fit the TPU slices that their configs are meant for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sana_jax.measure import tpu_estimate

ROOT = Path(__file__).parents[1]


@pytest.mark.slow  # five minutes each and more
@pytest.mark.skipif(not tpu_estimate.has_libtpu(), reason="libtpu is not installed")
@pytest.mark.parametrize(
    "config, topology, phase",
    [
        ("dc_ae_f32c32", "v5e:4x4", ["--phase=low_resolution"]),
        ("dc_ae_f32c32", "v5e:4x4", ["--phase=latent_adaptation"]),
        ("dc_ae_f32c32", "v5e:4x4", ["--phase=local_refinement"]),
        ("sana_600m_512", "v5e:16x16", []),
        ("sana_1600m_1024", "v5e:16x16", []),
    ],
)
def test_a_step_fits(config, topology, phase):
    """With their own batches, optimizers, averages and frozen networks."""
    command = [sys.executable, "-m", "sana_jax.compile", "--memory", *phase]
    result = subprocess.run(
        [*command, f"--config=configs/{config}.py", f"--topology={topology}"],
        cwd=ROOT,
        env=os.environ | {"JAX_OPTIMIZATION_LEVEL": "O1"},  # the default takes much longer
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    assert json.loads(result.stdout.splitlines()[-1])["fits"]
