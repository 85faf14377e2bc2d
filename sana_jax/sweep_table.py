"""Prints a table of the runs of a sweep, and draws their curves.

    python -m sana_jax.sweep_table --out=DIR --metrics=held_out_loss --plot=FILE.png

DIR is --out of launch/sweep, which calls this command once its runs have ended. DIR/SETTING is a
run, or DIR/SETTING/seed_N is one for each seed. The table has a row for each setting: the values at
the last step in metrics.jsonl and, for an autoencoder's phase, the held-out figures by size in
pixels, such as psnr_128. Of several seeds it shows mean ± standard deviation (of a sample: with
n - 1). Lines that a killed run left half written are passed over.

The plot needs matplotlib. It has a panel for each of --metrics: a colour for each setting, its mean
over seeds as a thick line, and each seed as a thin one.
"""

import importlib.util
import re
import statistics
from typing import NamedTuple

from absl import flags
from etils import epath

from sana_jax.runtime import cli
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import parse_json
from sana_jax.training.rows import Row, curve, read_rows

if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", None, "folder of the sweep's runs", required=True)
    _METRICS = flags.DEFINE_list("metrics", [], "columns of the table; default: all")
    _PLOT = flags.DEFINE_string("plot", None, "a PNG to write, with the curves of --metrics")
    _CHECK = flags.DEFINE_bool("check", False, "only check --plot, before there are runs")
    _TITLE = flags.DEFINE_string("title", "setting", "title of the first column")
    _RUN = flags.DEFINE_multi_string(
        "run", [], "a run as END:FOLDER, the folder within DIR; default: all, with unknown ends"
    )

SEED = re.compile(r"seed_\d+")  # the folder of one of several seeds


class Run(NamedTuple):
    """A run, or one phase of a run."""

    setting: str
    end: str
    seeded: bool  # its folder names a seed
    phase: str | None
    rows: list[Row]  # of metrics.jsonl
    figures: Row  # of results.json


def parsed(text: bytes) -> Row:
    """Returns an object of JSON; an empty one for anything else."""
    try:
        found = parse_json(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def find_runs(out: epath.Path) -> list[str]:
    """Returns --run of every run in a folder, its end unknown."""
    names = []
    for setting in _folders(out):
        seeds = [folder.name for folder in _folders(setting) if SEED.fullmatch(folder.name)]
        names += [f"{setting.name}/{seed}" for seed in seeds] or [setting.name]
    return [f"-:{name}" for name in names]


def read(out: epath.Path, runs: list[str]) -> list[Run]:
    """Reads runs, each given as END:FOLDER, and every phase of each."""
    found = []
    for end, _, name in (run.partition(":") for run in runs):
        folder, (setting, *seed) = out / name, name.split("/")
        for part in (folder, *_folders(folder)):
            if not (part / "metrics.jsonl").exists():
                continue
            rows, figures = read_rows(part), {}
            if (results := part / "results.json").exists():
                for size, values in parsed(results.read_bytes()).get("after", {}).items():
                    figures |= {f"{k}_{size}": x for k, x in values.items() if type(x) is float}
            phase = None if part == folder else part.name
            found.append(Run(setting, end, bool(seed), phase, rows, figures))
    return found


def last(run: Run) -> Row:
    """Returns all values of a run's last step, and its figures."""
    row: Row = {}
    for line in run.rows:
        if line["step"] == run.rows[-1]["step"]:
            row |= line
    return row | run.figures


def table(runs: list[Run], title: str, metrics: list[str]) -> tuple[str, list[str]]:
    """Returns the table, and the columns that there are to choose from."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.setting, run.phase), []).append(run)
    rows = []
    for (setting, phase), members in groups.items():
        row = {title: setting, "end": ", ".join(dict.fromkeys(run.end for run in members))}
        if any(run.seeded for run in runs):
            row["runs"] = str(len(members))
        if phase:
            row["phase"] = phase
        rows.append(row | _merged([last(run) for run in members]))
    known = list(dict.fromkeys(name for row in rows for name in row))
    columns = known
    if metrics:
        columns = [c for c in (title, "end", "runs", "phase", "step", *metrics) if c in known]
    shown = [columns, *([row.get(c, "-") for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = ["  ".join(map(str.rjust, line, widths)) for line in shown]
    return "\n".join(lines), known


def plot(runs: list[Run], metrics: list[str], path: str) -> None:
    """Writes a PNG with the metrics' curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = list(dict.fromkeys((run.setting, run.phase) for run in runs))
    figure, panels = pyplot.subplots(1, len(metrics), figsize=(6 * len(metrics), 4), squeeze=False)
    for panel, metric in zip(panels[0], metrics, strict=True):
        for i, (setting, phase) in enumerate(settings):
            curves = [
                curve(r.rows, metric) for r in runs if (r.setting, r.phase) == (setting, phase)
            ]
            steps = sorted(set.intersection(*map(set, curves)))
            means = [statistics.fmean(found[step] for found in curves) for step in steps]
            name = f"{setting}, {phase}" if phase else setting
            panel.plot(steps, means, color=f"C{i}", linewidth=2, label=name)
            for found in curves if len(curves) > 1 else ():
                panel.plot(*zip(*sorted(found.items()), strict=True), color=f"C{i}", linewidth=0.6)
        panel.set(xlabel="step", ylabel=metric)
        panel.grid(alpha=0.3)
    panels[0][-1].legend(fontsize="small")
    figure.tight_layout()
    with epath.Path(path).open("wb") as file:
        figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)


def check_plot(path: str, metrics: list[str]) -> None:
    """Raises UserError if a plot of `metrics` cannot be made."""
    if not metrics:
        raise UserError(f"--plot={path}: name what it shows, as --metrics=held_out_loss")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"--plot={path} needs matplotlib: pip install 'matplotlib>=3.9,<4'")
    if not epath.Path(path).parent.is_dir():
        raise UserError(f"--plot={path}: there is no such folder; name another")


def _folders(folder: epath.Path) -> list[epath.Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _merged(rows: list[Row]) -> dict[str, str]:
    """Returns the cells of runs that differ in their seeds."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _cell(name, [row[name] for row in rows if name in row]) for name in names}


def _cell(name: str, values: list) -> str:
    """Returns what the values of one column have in common, or their mean and spread."""
    if len(values) == 1 or name == "step" or not all(type(x) in (int, float) for x in values):
        shown = (f"{x:.5g}" if isinstance(x, float) else str(x) for x in values)
        return ", ".join(dict.fromkeys(shown))
    return f"{statistics.fmean(values):.5g} ± {statistics.stdev(values):.2g}"


def main(argv):
    del argv
    out, metrics = epath.Path(_OUT.value), [name for name in _METRICS.value if name]
    if _PLOT.value:
        check_plot(_PLOT.value, metrics)
    if _CHECK.value:
        return
    runs = [run for run in read(out, _RUN.value or find_runs(out)) if run.rows or run.figures]
    if not runs:
        if not _RUN.value:
            raise UserError(f"--out={out} has no runs, which have a metrics.jsonl")
        return
    shown, known = table(runs, _TITLE.value, metrics)
    print(shown)
    if missing := [name for name in metrics if name not in known]:
        raise UserError(f"--metrics: no run has {', '.join(missing)}; they have {', '.join(known)}")
    if _PLOT.value:
        plot(runs, metrics, _PLOT.value)
        print(_PLOT.value)


if __name__ == "__main__":
    cli.run(main)
