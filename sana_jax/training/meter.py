"""What the loop knows of itself: means between two rows, rates, pauses, streaks of NaN."""

import time
from typing import Any

import jax
import numpy as np


class Meter:
    """Gathers what the steps return; `row` gives the means since the row before."""

    def __init__(self, peak_rate: float | None = None):
        """`peak_rate`: images/s at the devices' peak, for the share of it that is reached."""
        self.streak, self._peak_rate = 0, peak_rate
        self._shapes: set[tuple[Any, ...]] = set()  # of batches, for which a step is compiled
        self._reset()

    def dispatched(self, batch: Any, seconds: float, waited: float) -> None:
        """A step was dispatched, which took `seconds`; the device had `waited` for its batch."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if not self._shapes:  # what went before the first step was no training
            self._reset()
            self._began -= seconds
        else:
            self._waited += waited
        if shapes not in self._shapes:  # the rate is that of the steps, not of the compiler
            self._shapes.add(shapes)
            self.paused("compile", seconds)

    def read(self, metrics: dict[str, Any], rows: int) -> None:
        """Waits for what a step returned, a batch of `rows`, and takes it in."""
        values = jax.device_get(metrics)
        self.streak = int(values.pop("streak"))
        self._skipped = int(values.pop("skipped"))
        self._rows += rows
        if not self.streak:
            for name, value in values.items():
                self._values.setdefault(name, []).append(value)

    def paused(self, name: str, seconds: float) -> None:
        """Something else than steps ran."""
        self._pauses[name] = self._pauses.get(name, 0.0) + seconds

    def row(self) -> dict[str, float]:
        """The row; starts a new one."""
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
