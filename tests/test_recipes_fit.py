"""The full-size recipes fit the TPU slices that their configs are meant for."""

from pathlib import Path

import pytest

from sana_jax.measure import tpu_estimate
from tests.benchmarks.recipes_fit import HEAD, RECIPES, compiled, row

ROOT = Path(__file__).parents[1]


def stated():
    """Returns the cells of every row of the table: label, mesh, pictures and memory."""
    _, _, after = (ROOT / "configs/README.md").read_text().partition(f"{HEAD}\n")
    rows = after.partition("\n\n")[0].splitlines()
    return {
        cells[0]: cells for cells in ([c.strip() for c in r.strip("|").split("|")] for r in rows)
    }


def test_the_table_is_of_the_full_size_configs():
    patterns = "sana*.py", "sprint_*00m_*.py"
    configs = {path.stem for pattern in patterns for path in (ROOT / "configs").glob(pattern)}
    assert configs | {"dc_ae_f32c32"} == {config for config, *_ in RECIPES.values()}
    assert stated() and stated().keys() <= RECIPES.keys()
    for *_, memory in stated().values():
        needed, _, available = memory.partition(" of ")
        assert 0 < float(needed) <= float(available)


def test_a_row_says_where_a_step_runs_and_what_it_needs():
    found = dict(topology="v5e:2x4", mesh=dict(replica=2, fsdp=4, sequence=1, tensor=1), batch=0.5)
    found |= dict(size=512, hbm_bytes=3 * 2**29, hbm_available=63 * 2**28, fits=True)
    line = "| small | v5e:2x4, replica 2 x fsdp 4 | 0.5 of 512 px | 1.5 of 15.75 |"
    assert row("small", found) == line
    assert "| DOES NOT FIT: 20.0 of" in row("small", found | dict(hbm_bytes=20 * 2**30, fits=False))


@pytest.mark.slow  # minutes each
@pytest.mark.skipif(not tpu_estimate.has_libtpu(), reason="libtpu is not installed")
@pytest.mark.parametrize("label", RECIPES)
def test_a_step_fits(label):
    """With its own batch, optimizer, average and frozen networks, in what the table says."""
    found = compiled(label)
    print(row(label, found))
    assert found["fits"]
    if cells := stated().get(label):
        *said, memory = cells
        assert row(label, found).startswith(f"| {' | '.join(said)} | ")
        needed = float(memory.partition(" of ")[0])
        assert found["hbm_bytes"] / 2**30 == pytest.approx(needed, abs=0.15)
