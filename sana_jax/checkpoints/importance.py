"""The file of block importance that evaluate writes and convert reads.

A JSON object: `importance` has a number for every block, `sha256` is the hash of the transformer's
weights that it was measured on, and other keys tell how.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import read_json, unwritten, write_atomically

TASK = "importance"


def write(path: Path, figures: dict[str, Any]) -> None:
    """Writes the figures of a measurement, completely or not at all. Raises UserError or Retry."""
    text = json.dumps({"task": TASK} | figures, indent=2, allow_nan=False) + "\n"
    try:
        write_atomically(epath.Path(path), text.encode())
    except OSError as error:
        raise unwritten(str(path), error) from error


def read(path: str, sha256: Callable[[], str], depth: int) -> list[float]:
    """Returns the importance of each block of a transformer. Raises UserError.

    Args:
      path: the file, in messages --importance.
      sha256: returns the hash of the transformer's weights; it takes as long as to read them.
      depth: the number of its blocks.
    """
    name, found = f"--importance={path}", read_json(Path(path))
    numbers = found.get("importance")
    if found.get("task") != TASK or not isinstance(numbers, list):
        raise UserError(f"{name} is no file that evaluate --task={TASK} wrote")
    if not all(type(x) in (int, float) and 0 <= x < math.inf for x in numbers):
        raise UserError(f"{name} holds an importance that is not a number of 0 or more")
    if len(numbers) != depth:
        raise UserError(f"{name} is of {len(numbers)} blocks, and --source has {depth}: measure it")
    if found.get("sha256") != sha256():
        theirs = found.get("checkpoint")
        raise UserError(f"{name} is of other weights, {theirs!r:.60}: measure those of --source")
    return numbers
