"""Counts of the records that were read: each was used, or rejected for one reason."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

from absl import logging

from sana_jax.data.images import REASONS
from sana_jax.runtime.errors import DoNotRetry

EXAMPLES = 5  # bad records that the last message names
UNWANTED = "too_small", "low_score"  # left out as they were meant to be
NAMED = 1000  # and that are logged: a night has more than anybody reads


class Rejection(NamedTuple):
    """A record that cannot be used, and why."""

    key: str
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Budget:
    """The bad records that a run tolerates: `minimum` an epoch, or `fraction` of all if more.

    Every host has this budget for itself. Records that are only too small, or whose captions have
    too low a score, do not count.
    """

    fraction: float = 0.001
    minimum: int = 10

    def is_exceeded(self, counts: "Counts", epochs: int) -> bool:
        bad = sum(n for reason, n in counts.rejected.items() if reason not in UNWANTED)
        return bad > max(self.minimum * counts.hosts * epochs, self.fraction * counts.read)


@dataclasses.dataclass
class Counts:
    """`read` = `used` + the sum of `rejected`, which has every reason as a key."""

    read: int = 0
    used: int = 0
    rejected: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    examples: dict[str, str] = dataclasses.field(default_factory=dict)  # key -> why, the first ones
    hosts: int = 1  # whose records these are: more where a run goes on with fewer

    def add(self, used: int, rejections: Iterable[Rejection]) -> None:
        """Counts a batch's records; logs a bad record the first time."""
        self.used += used
        self.read += used
        for key, reason, detail in rejections:
            self.read += 1
            self.rejected[reason] += 1
            if key not in self.examples and len(self.examples) < NAMED:
                logging.warning("left out %s: %s", key, detail)
                self.examples[key] = detail

    def check(self, budget: Budget, epochs: int) -> None:
        """Raises DoNotRetry if more records are bad than the budget allows."""
        if budget.is_exceeded(self, epochs):
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
        examples, hosts = self.examples | other.examples, self.hosts + other.hosts
        return Counts(self.read + other.read, self.used + other.used, rejected, examples, hosts)

    def state(self) -> dict[str, Any]:
        """Returns the counts to store in a checkpoint, always with the same keys and types."""
        rejected = dict(self.rejected)
        return {"read": self.read, "used": self.used, "rejected": rejected, "hosts": self.hosts}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Counts":
        rejected = dict.fromkeys(REASONS, 0) | state["rejected"]
        return cls(state["read"], state["used"], rejected, hosts=state.get("hosts", 1))
