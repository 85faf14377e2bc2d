"""The rows of metrics.jsonl: a line is a JSON object with its step and numbers, or null for NaN.

JAX is not imported, so that commands which only read runs start at once.
"""

import json
import math
import sys
from typing import Any

from etils import epath

MAX_STEP = 2**53  # that a row can be of

Row = dict[str, Any]


def row_of(line: bytes) -> Row | None:
    """Returns the row in a line of metrics.jsonl; None where the line is no whole row."""
    try:
        row = json.loads(line)
        step = row["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return row if isinstance(step, int) and 0 <= step <= MAX_STEP else None


def read_rows(folder: epath.Path) -> list[Row]:
    """Returns the whole rows of a run, in order; [] where there is no metrics.jsonl.

    Lines that a killed run left half written are passed over. Raises OSError.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [row for line in lines if (row := row_of(line)) is not None]


def curve(rows: list[Row], metric: str) -> dict[int, float]:
    """Returns a metric by step; of a step that was taken twice, the later value.

    A value that was not finite is null in a row, and NaN here: a gap in the curve.
    """
    found = {row["step"]: row[metric] for row in rows if metric in row}
    return {step: value if is_finite(value) else math.nan for step, value in found.items()}


def is_finite(value: Any) -> bool:
    """Returns True for a number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
