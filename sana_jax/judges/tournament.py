"""The tournament of SANA-1.5 (arXiv 2501.18427, section 2.4), by which pictures of N are kept.

A verifier says of each picture whether it fits its prompt. Neighbours meet, and the winners meet in
their order, until as many are left as are kept; so these are the best of N / kept candidates each,
and not the best of all, as in NVlabs' tools/inference_scaling. N is a power of two.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Answer(NamedTuple):
    """What a verifier says of a picture: yes or no, and the logarithms of both probabilities."""

    says: str
    yes: float
    no: float


def first_wins(first: Answer, second: Answer) -> bool:
    """Returns True if the first of two pictures goes on.

    Yes beats no. Of two that are both yes the surer one goes on, of two that are both no the less
    sure one, and the second where they are equal.
    """
    if first.says != second.says:
        return first.says == "yes"
    return first.yes > second.yes if first.says == "yes" else first.no < second.no


def winners(answers: Sequence[Sequence], keep: int) -> list[int]:
    """Returns the positions of the `keep` pictures that are left, in their order."""
    left = list(range(len(answers)))
    while len(left) > keep:
        left = [
            one if first_wins(Answer(*answers[one]), Answer(*answers[other])) else other
            for one, other in zip(left[::2], left[1::2], strict=True)
        ]
    return left
