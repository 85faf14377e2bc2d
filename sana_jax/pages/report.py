"""The report of runs: everything that its page shows, and the page.

The same runs give the same page, to the byte: it does not say when it was made.
"""

import math
import statistics
from typing import Any

from sana_jax.pages import embed
from sana_jax.pages.incidents import incidents_of, restarts
from sana_jax.pages.page import as_json, render
from sana_jax.pages.runs import Run, shown
from sana_jax.runtime.errors import UserError
from sana_jax.training.rows import Row, curve, is_finite

POINTS = 60_000  # of all curves together
Point = tuple[int, float | None]


def page(runs: list[Run], most: int) -> tuple[bytes, list[str]]:
    """Returns the page of some runs, of `most` bytes at most, and notes on what it leaves out.

    Raises UserError where the curves and configs alone are more than that, and OSError.
    """
    metrics = dict.fromkeys(name for run in runs for name in _metrics(run))
    points = max(50, min(1000, POINTS // max(1, len(metrics) * len(runs))))
    data = {"runs": [_facts(run, points) for run in runs], "metrics": list(metrics)}
    room = most - len(render("report.html", data))
    if room < 0:
        raise UserError(f"--megabytes={most / 10**6:g}: the curves alone are {-room} bytes more")
    wanted = [
        (i, name, step, path)
        for i, run in enumerate(runs)
        for name, sheets in run.pictures().items()
        for step, path in sheets.items()
    ]
    chosen = _spread(wanted, room // embed.LEAST)
    notes = []
    if len(chosen) < len(wanted):
        notes.append(
            f"{len(wanted) - len(chosen)} of {len(wanted)} sheets of pictures are left out"
        )
        notes[0] += ": raise --megabytes to see them"
    room -= sum(len(as_json([name, str(step)])) + 8 for _, name, step, _ in chosen)
    made = embed.embed([path for *_, path in chosen], room)
    for (i, name, step, path), uri in zip(chosen, made, strict=True):
        if isinstance(uri, ValueError):
            text = f"{path.name} cannot be shown: {uri}"
            data["runs"][i]["incidents"].append([step, text])
            notes.append(f"{path}: {uri}")
        else:
            data["runs"][i]["pictures"].setdefault(name, []).append([step, uri])
    return render("report.html", data | {"notes": notes}), notes


def _facts(run: Run, points: int) -> dict[str, Any]:
    """Returns what the page knows of a run, without its pictures."""
    curves = {name: thinned(curve(run.rows, name), points) for name in _metrics(run)}
    return {
        "name": run.name,
        "group": run.group,
        "summary": _summary(run),
        "curves": {name: [list(point) for point in points] for name, points in curves.items()},
        "prompts": run.prompts,
        "pictures": {},
        "figures": _figures(run),
        "config": {key: shown(value) for key, value in run.config.items()},
        "incidents": [list(each) for each in incidents_of(run)],
    }


def _metrics(run: Run) -> list[str]:
    return list(dict.fromkeys(key for row in run.rows for key in row if key != "step"))


def _summary(run: Run) -> dict[str, Any]:
    """Returns the row of a run in the table at the top of the page."""

    def values(name: str) -> list[float]:
        return [x for x in curve(run.rows, name).values() if math.isfinite(x)]

    found = {"steps": f"{run.last_step}" + (f" of {run.steps}" if run.steps else "")}
    for name in "loss", "held_out_loss", "psnr":
        if last := values(name)[-1:]:
            found[name.replace("held_out_", "held-out ")] = f"{last[0]:.4g}"
    for name, title, form in (
        ("images_per_second", "images/s, median", "{:.4g}"),
        ("mfu", "MFU, median", "{:.1%}"),
        ("data_wait", "waiting for data, median", "{:.1%}"),
    ):
        if every := values(name):
            found[title] = form.format(statistics.median(every))
    found["skipped updates"] = f"{int(max(values('skipped'), default=0))}"
    found["restarts"] = f"{restarts(run)}"
    return found


def _figures(run: Run) -> list[list[Any]]:
    """Returns [step, whether its checkpoint is there, figures], of held-out data and evaluate."""
    found: dict[int | None, Row] = {}
    for row in run.rows:
        held = {name: x for name, x in row.items() if "held_out" in name and x is not None}
        if held:
            found.setdefault(row["step"], {}).update(held)
    for step, figures in run.evaluations().items():
        found.setdefault(step, {}).update(figures)
    for step in run.checkpoints:
        found.setdefault(step, {})
    order = sorted(found, key=lambda step: (step is None, step))
    return [[step, step in run.checkpoints, _rounded(found[step])] for step in order]


def _rounded(values: Row) -> dict[str, float]:
    numbers = {k: x for k, x in values.items() if is_finite(x)}
    return {name: float(f"{x:.6g}") for name, x in numbers.items()}


def thinned(values: dict[int, float], most: int) -> list[Point]:
    """Returns about `most` points of a curve, in order; None is a value that is not finite.

    Of neighbours that become two points, these are the least and the greatest, so that no spike is
    lost; where none is finite there stays a gap.
    """
    points = [(s, float(f"{x:.6g}") if math.isfinite(x) else None) for s, x in values.items()]
    points.sort(key=lambda point: point[0])
    if len(points) <= most:
        return points
    size, kept = math.ceil(2 * len(points) / most), []
    for i in range(0, len(points), size):
        group = points[i : i + size]
        finite = [point for point in group if point[1] is not None]
        ends = {min(finite, key=_value), max(finite, key=_value)} if finite else {group[0]}
        kept += sorted(ends)
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _value(point: Point) -> float:
    return point[1] if point[1] is not None else math.nan


def _spread(wanted: list, most: int) -> list:
    """Returns at most `most` of a list, evenly spread, the first and the last among them."""
    if len(wanted) <= most:
        return wanted
    picks = [round(i * (len(wanted) - 1) / max(most - 1, 1)) for i in range(most)]
    return [wanted[i] for i in picks]
