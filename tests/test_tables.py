"""The compiler's figures that README files quote are what their commands print today.

The commands take minutes each, so they are marked slow: `bash launch/test -m slow -k tables`. That
the tables name every row is part of the suite.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sana_jax.measure import tpu_estimate

ROOT = Path(__file__).parent.parent
TRUNK = {  # row of kernels/README.md -> options of its command
    "ours without kernels, 0.6B": ["--model=0.6B", "--implementation=xla"],
    "ours, 0.6B": ["--model=0.6B"],
    "ours, 1.6B": ["--model=1.6B"],
}
QUANTISED = {"0.6B, 1024 px, batch 16": "0.6B", "1.6B, 1024 px, batch 8": "1.6B"}  # the same
POD = "--topology=v5e:16x16"
PROGRAMS = {  # row of launch/README.md -> options of its command
    "`sana_600m_512.py`": ["--config=configs/sana_600m_512.py", POD],
    "`sana_1600m_1024.py`": ["--config=configs/sana_1600m_1024.py", POD],
    "`dc_ae_f32c32.py`, first phase": ["--config=configs/dc_ae_f32c32.py", "--topology=v5e:4x4"],
    "drawing: 20 steps of the 1.6B transformer at 4096 px": [
        *("--preset=sana_1600m_1024", "--what=sample", "--size=4096", "--topology=v5e:2x2"),
    ],
}


def row(readme, label):
    """Returns the cells behind `label` in a table of a README file."""
    lines = (ROOT / readme).read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def last_line(module, *options):
    """Runs a command of the project and returns its JSON."""
    command = [sys.executable, "-m", module, *options]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if "--memory" in options:  # compiles sooner so, but to products that take three times as long
        environment["JAX_OPTIMIZATION_LEVEL"] = "O1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def cycles_of_a_layer(found):
    """Of `trunk_estimate`, which compiles fewer layers of bfloat16's sampling than of int8's."""
    return (found["cycles"] + found["kernel_cycles"]) / found["layers"]


def test_the_tables_have_the_rows_that_are_made_again():
    for label in TRUNK:
        assert len(row("sana_jax/kernels/README.md", label)) == 2
    for label in QUANTISED:
        assert float(row("sana_jax/kernels/README.md", label)[0]) < 1
    for label in PROGRAMS:
        assert float(row("launch/README.md", label)[-1]) > 0


needs_libtpu = pytest.mark.skipif(
    not tpu_estimate.has_libtpu(), reason="libtpu, the TPU compiler, is not installed"
)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("column, what", list(enumerate(["forward", "backward"])))
@pytest.mark.parametrize("label", TRUNK)
def test_the_table_of_the_blocks_is_what_its_command_prints(label, column, what):
    found = last_line("tests.benchmarks.trunk_estimate", *TRUNK[label], f"--what={what}")
    stated = float(row("sana_jax/kernels/README.md", label)[column].split()[0])
    assert 100 * found["share_of_peak"] == pytest.approx(stated, abs=0.5)  # percentage points


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("label", QUANTISED)
def test_the_share_of_int8_blocks_is_what_their_command_prints(label):
    estimates = (
        last_line("tests.benchmarks.trunk_estimate", f"--model={QUANTISED[label]}", *options)
        for options in ([], ["--quantise=w8a8"])
    )
    bfloat16, int8 = map(cycles_of_a_layer, estimates)
    stated = float(row("sana_jax/kernels/README.md", label)[0])
    assert int8 / bfloat16 == pytest.approx(stated, abs=0.01)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("label", PROGRAMS)
def test_the_table_of_what_fits_is_what_compile_prints(label):
    found = last_line("sana_jax.compile", *PROGRAMS[label], "--memory")
    stated = float(row("launch/README.md", label)[-1])
    assert found["fits"] and found["hbm_bytes"] / 2**30 == pytest.approx(stated, abs=0.15)
