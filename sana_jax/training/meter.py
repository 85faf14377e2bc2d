"""The loop's measurements between two rows: means, rates, pauses, and streaks of NaN."""

import time
from typing import Any

import jax
import numpy as np


class Meter:
    """Gathers the metrics that steps return; `row` gives their means since the row before.

    Attributes:
      streak: updates skipped in a row, up to the last step that was read.
    """

    def __init__(self, peak_rate: float | None = None):
        """`peak_rate`: images/s at the devices' peak; rows then have `mfu`, the share reached."""
        self.streak, self._peak_rate = 0, peak_rate
        self._shapes: set[tuple[Any, ...]] = set()  # of batches, for which a step is compiled
        self._reset()

    def dispatched(self, batch: Any, seconds: float, waited: float) -> None:
        """Notes that dispatching a step took `seconds`, after the device `waited` for `batch`."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if not self._shapes:  # the time before the first step was no training
            self._reset()
            self._began -= seconds
        else:
            self._waited += waited
        if shapes not in self._shapes:  # the step compiles, which does not count in the rate
            self._shapes.add(shapes)
            self.paused("compile", seconds)

    def read(self, metrics: dict[str, Any], rows: int) -> None:
        """Waits for the metrics of a step on a batch of `rows` rows, and takes them in."""
        values = jax.device_get(metrics)
        self.streak = int(values.pop("streak"))
        self._skipped = int(values.pop("skipped"))
        self._rows += rows
        if not self.streak:
            for name, value in values.items():
                self._values.setdefault(name, []).append(value)

    def paused(self, name: str, seconds: float) -> None:
        """Notes that something other than steps, called `name`, ran for `seconds`."""
        self._pauses[name] = self._pauses.get(name, 0.0) + seconds

    def row(self) -> dict[str, float]:
        """Returns the row since the last one, and starts a new one."""
        seconds = max(time.monotonic() - self._began - sum(self._pauses.values()), 1e-9)
        row = {
            name: float(np.mean(values, dtype=np.float64)) for name, values in self._values.items()
        }
        row |= {
            "skipped": self._skipped,
            "images_per_second": self._rows / seconds,
            "data_wait": min(self._waited / seconds, 1.0),
        }
        if self._peak_rate:
            row["mfu"] = row["images_per_second"] / self._peak_rate
        row |= {f"{name}_seconds": spent for name, spent in self._pauses.items()}
        self._reset()
        return row

    def _reset(self) -> None:
        self._began, self._rows, self._waited, self._skipped = time.monotonic(), 0, 0.0, 0
        self._values: dict[str, list[Any]] = {}
        self._pauses: dict[str, float] = {}
