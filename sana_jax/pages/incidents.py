"""What went wrong in a run, or was out of the ordinary, by its own files."""

import datetime
from typing import NamedTuple

from sana_jax.pages.runs import Run
from sana_jax.training.metrics_writer import Began, starts_of


class Incident(NamedTuple):
    step: int | None
    what: str


def incidents_of(run: Run) -> list[Incident]:
    """Returns restarts, skipped updates, bad records and damaged files. Raises OSError."""
    return [*_restarts(run), *_skipped(run), *_bad_records(run), *_damaged(run)]


def restarts(run: Run) -> int:
    """Returns how often a process went on with the run after its first one."""
    return len(_went_on(run))


def _went_on(run: Run) -> list[Began]:
    """Returns the starts after the first, but for those of a run that was over already."""
    starts = starts_of(run.folder)[1:]
    return [each for each in starts if None in (each.step, run.steps) or each.step < run.steps]


def _restarts(run: Run) -> list[Incident]:
    found = []
    for start in _went_on(run):
        # In UTC: the page is to be the same wherever it is made.
        when = datetime.datetime.fromtimestamp(start.time, datetime.UTC)
        before = "it did not get as far as a row" if start.step is None else "it went on from here"
        found.append(Incident(start.step, f"restart at {when:%Y-%m-%d %H:%M:%S} UTC: {before}"))
    return found


def _skipped(run: Run) -> list[Incident]:
    """Returns the rows at which the count of skipped updates, kept in the state, had grown."""
    found, total, before = [], 0, 0
    for row in run.rows:
        if not isinstance(count := row.get("skipped"), int):
            continue
        if count > total:
            text = f"{count - total} updates after step {before} were not finite and left out"
            found.append(Incident(row["step"], text))
        total, before = count, row["step"]
    return found


def _bad_records(run: Run) -> list[Incident]:
    """Returns the records that the loaders of all hosts had rejected by the newest checkpoint."""
    rejected: dict[str, int] = {}
    states = [each.get("json") for each in run.document.get("iterators", ()) if each]
    states = [state for state in states if isinstance(state, dict) and "rejected" in state]
    for state in states:
        for reason, count in state["rejected"].items():
            rejected[reason] = rejected.get(reason, 0) + count
    reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.items() if count)
    read = sum(state.get("read", 0) for state in states)
    text = f"bad records of {read} read: {reasons}"
    return [Incident(run.document.get("step"), text)] if reasons else []


def _damaged(run: Run) -> list[Incident]:
    found = []
    for path in sorted((run.folder / "checkpoints").glob("*.bad")):
        step = path.stem if path.stem.isdecimal() else None
        found.append(Incident(step and int(step), f"damaged checkpoint, set aside as {path.name}"))
    aside = run.folder / "metrics.jsonl.bad"
    if aside.exists():
        count = len(aside.read_bytes().splitlines())
        found.append(Incident(None, f"{count} damaged lines of metrics.jsonl, now in {aside.name}"))
    return found
