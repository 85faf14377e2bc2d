"""Counts add up, and a budget is for bad records alone."""

import pytest

from sana_jax.data.rejections import Budget, Counts, Rejection
from sana_jax.runtime.errors import DoNotRetry


def counts(used=0, **rejected):
    found = Counts()
    found.add(used, [Rejection(f"{r}{i}", r, "x") for r, n in rejected.items() for i in range(n)])
    return found


def test_read_is_used_and_rejected():
    found = counts(5, truncated=2, too_small=1)
    assert (found.read, found.used) == (8, 5)
    assert str(found) == "8 read, 5 used, 2 truncated, 1 too_small"


def test_a_state_comes_back_and_counts_of_hosts_add_up():
    first, second = counts(5, truncated=2), counts(1, too_small=1)
    again = Counts.from_state(first.state())
    assert again.state() == first.state()
    both = again + second
    assert (both.read, both.used, both.hosts) == (9, 6, 2)


@pytest.mark.parametrize(
    "reason, raises", [("truncated", True), ("too_small", False), ("low_score", False)]
)
def test_only_bad_records_use_up_the_budget(reason, raises):
    found = counts(100, **{reason: 4})
    if not raises:
        return found.check(Budget(0.01, 3), epochs=1)
    with pytest.raises(DoNotRetry, match=r"too many bad records: .*budget is 1.000%.*truncated0"):
        found.check(Budget(0.01, 3), epochs=1)


def test_the_budget_grows_with_epochs():
    counts(100, truncated=4).check(Budget(0.01, 3), epochs=2)
