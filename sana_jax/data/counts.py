"""What became of the records that were read: each was used, or rejected for one reason."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

from absl import logging

from sana_jax.data.images import REASONS
from sana_jax.errors import DoNotRetry

EXAMPLES = 5  # bad records that the last message names


class Rejection(NamedTuple):
    """A record that was read in vain."""

    key: str
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Budget:
    """How many bad records a run stands: `minimum` an epoch, or `fraction` of all if that is more.

    Records that are only too small do not count here.
    """

    fraction: float = 0.001
    minimum: int = 10

    def is_exceeded(self, rejected: dict[str, int], read: int, epochs: int) -> bool:
        bad = sum(rejected.values()) - rejected.get("too_small", 0)
        return bad > max(self.minimum * epochs, self.fraction * read)


@dataclasses.dataclass
class Counts:
    """`read` = `used` + the sum of `rejected`, which has every reason as a key."""

    read: int = 0
    used: int = 0
    rejected: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    examples: dict[str, str] = dataclasses.field(default_factory=dict)  # key -> why, the first ones

    def add(self, used: int, rejections: Iterable[Rejection]) -> None:
        """Counts what a batch took; logs a bad record the first time."""
        self.used += used
        self.read += used
        for key, reason, detail in rejections:
            self.read += 1
            self.rejected[reason] += 1
            if key not in self.examples:
                logging.warning("left out %s: %s", key, detail)
                self.examples[key] = detail

    def check(self, budget: Budget, epochs: int) -> None:
        """Raises DoNotRetry where more is bad than the budget allows."""
        if budget.is_exceeded(self.rejected, self.read, epochs):
            raise DoNotRetry(
                f"too many bad records: {self}; the budget is {budget.fraction:.3%} of those read,"
                f" or {budget.minimum} an epoch; for example {self.some_examples()}"
            )

    def some_examples(self) -> str:
        return "; ".join(f"{key} ({why})" for key, why in list(self.examples.items())[:EXAMPLES])

    def __str__(self) -> str:
        reasons = [f"{count} {reason}" for reason, count in self.rejected.items() if count]
        return f"{self.read} read, {self.used} used, " + (", ".join(reasons) or "none rejected")

    def __add__(self, other: "Counts") -> "Counts":
        rejected = {reason: self.rejected[reason] + other.rejected[reason] for reason in REASONS}
        examples = self.examples | other.examples
        return Counts(self.read + other.read, self.used + other.used, rejected, examples)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the same keys and types always."""
        return {"read": self.read, "used": self.used, "rejected": dict(self.rejected)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Counts":
        rejected = dict.fromkeys(REASONS, 0) | state["rejected"]
        return cls(state["read"], state["used"], rejected)
