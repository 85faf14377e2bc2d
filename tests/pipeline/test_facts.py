"""What is usual for a kind of checkpoint."""

import pytest

from sana_jax.checkpoints import random_weights
from sana_jax.pipeline.facts import Facts, usual_steps


@pytest.mark.parametrize(
    "preset, steps, strength",
    [(random_weights.TINY, 20, 0.6), (random_weights.TINY_SPRINT, 2, 0.5)],
)
def test_the_facts_of_a_checkpoint(preset, steps, strength):
    checkpoint = random_weights.make(preset)
    facts = Facts.of(checkpoint)
    assert (facts.factor, facts.native_size, facts.text_rows) == (32, 256, 300)
    assert (facts.num_steps, facts.strength) == (steps, strength)
    assert usual_steps(facts.is_sprint) == steps
