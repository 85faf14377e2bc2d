"""The table and the plot of a sweep, from runs' own files."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from sana_jax import sweep_table
from tests.test_launch import ROOT


def make(folder, *rows, results=None):
    """Writes what a run leaves in its folder."""
    folder.mkdir(parents=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))


def show(*flags):
    line = [sys.executable, "-m", "sana_jax.sweep_table", *map(str, flags)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def sweep(tmp_path):
    """Two settings of two seeds each."""
    for setting, losses in {"base": (1.0, 2.0), "network.ffn=mlp": (3.0, 3.5)}.items():
        for seed, loss in enumerate(losses):
            rows = [{"step": step, "loss": loss * 10 / step} for step in (5, 10)]
            make(tmp_path / "runs" / setting / f"seed_{seed}", *rows)
    return tmp_path / "runs"


def test_a_row_has_the_mean_and_the_standard_deviation_of_the_seeds(sweep):
    found = show(f"--out={sweep}", "--metrics=loss")
    assert found.returncode == 0, found.stderr
    assert [line.split() for line in found.stdout.splitlines()] == [
        ["setting", "end", "runs", "step", "loss"],
        ["base", "-", "2", "10", "1.5", "±", "0.71"],
        ["network.ffn=mlp", "-", "2", "10", "3.25", "±", "0.35"],
    ]


def test_runs_have_the_order_and_the_ends_that_are_given(sweep):
    runs = "done:network.ffn=mlp/seed_0", "done:base/seed_0", "stopped:base/seed_1"
    given = [f"--run={run}" for run in runs]
    found = show(f"--out={sweep}", *given, "--title=field", "--metrics=loss").stdout
    assert [line.split() for line in found.splitlines()] == [
        ["field", "end", "runs", "step", "loss"],
        ["network.ffn=mlp", "done", "1", "10", "3"],
        ["base", "done,", "stopped", "2", "10", "1.5", "±", "0.71"],
    ]


def test_phases_and_figures_of_an_autoencoder_have_rows_and_columns(tmp_path):
    after = {"after": {"128": {"psnr": 30.5, "count": 5}}}
    for seed in 0, 1:
        make(tmp_path / f"1e-4/seed_{seed}/low", {"step": 2, "loss": 0.5}, results=after)
        make(tmp_path / f"1e-4/seed_{seed}/high", {"step": 3, "loss": 0.25})
    runs = sweep_table.read(tmp_path, sweep_table.find_runs(tmp_path))
    shown, known = sweep_table.table(runs, "rate", [])
    assert known == ["rate", "end", "runs", "phase", "step", "loss", "psnr_128"]
    assert [line.split() for line in shown.splitlines()[1:]] == [
        ["1e-4", "-", "2", "high", "3", "0.25", "±", "0", "-"],
        ["1e-4", "-", "2", "low", "2", "0.5", "±", "0", "30.5", "±", "0"],
    ]


def test_a_plot_is_a_small_png(sweep, tmp_path):
    path = tmp_path / "plot.png"
    found = show(f"--out={sweep}", "--metrics=loss", f"--plot={path}")
    assert found.returncode == 0 and found.stdout.splitlines()[-1] == str(path), found.stderr
    with Image.open(path) as picture:
        assert picture.format == "PNG" and min(picture.size) >= 300
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**20)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # matplotlib's first two
    assert path.stat().st_size < 150_000


def test_a_run_that_diverged_leaves_a_gap_in_the_plot(sweep, tmp_path):
    make(sweep / "lr=1" / "seed_0", {"step": 5, "loss": 2.0}, {"step": 10, "loss": None})
    found = show(f"--out={sweep}", "--metrics=loss", f"--plot={tmp_path / 'plot.png'}")
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert found.stdout.splitlines()[2].split() == ["lr=1", "-", "1", "10", "None"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--metrics=los"], "no run has los; they have setting, end, runs, step, loss"),
        (["--plot=x.png"], "name what it shows, as --metrics="),
        (["--plot=/nowhere/x.png", "--metrics=loss", "--check"], "there is no such folder"),
        (["--out=/nowhere"], "/nowhere has no runs"),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_line(sweep, flags, words):
    found = show(f"--out={sweep}", *flags)
    assert found.returncode == 2 and words in found.stderr
    assert found.stderr.count("\n") == 1


def test_a_plot_without_matplotlib_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(sweep_table.UserError, match="needs matplotlib: pip install"):
        sweep_table.check_plot("plot.png", ["loss"])
