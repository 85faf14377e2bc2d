"""The rules of nvila_sana_pick.py, by hand."""

import pytest

from sana_jax.judges.tournament import Answer, first_wins, winners

SURE, UNSURE = Answer("yes", -0.1, -2.3), Answer("yes", -0.5, -0.9)
HARDLY, NEVER = Answer("no", -0.9, -0.5), Answer("no", -2.3, -0.1)


@pytest.mark.parametrize("order", [[SURE, UNSURE, HARDLY, NEVER]])
def test_yes_beats_no_and_the_surer_answer_breaks_a_tie(order):
    for i, better in enumerate(order):
        for worse in order[i + 1 :]:
            assert first_wins(better, worse) and not first_wins(worse, better)
        assert not first_wins(better, better)  # of equals the second goes on


def test_neighbours_meet_and_winners_meet_in_their_order():
    answers = [HARDLY, UNSURE, NEVER, HARDLY, SURE, UNSURE, UNSURE, SURE]
    assert winners(answers, 4) == [1, 3, 4, 7]
    assert winners(answers, 2) == [1, 7]  # the second of two that are equally sure
    assert winners(answers, 1) == [7]
    assert winners(answers, 8) == [*range(8)]


def test_those_that_are_kept_are_the_best_of_their_quarters_not_of_all():
    answers = [SURE, SURE, NEVER, NEVER]
    assert winners(answers, 2) == [1, 3]
