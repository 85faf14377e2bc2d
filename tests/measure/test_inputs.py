"""Both sides are given the same inputs, of the lengths that are stated."""

import numpy as np

from sana_jax.measure import inputs
from sana_jax.text.tokenizers import toy_tokenizer


def test_texts_have_the_stated_number_of_tokens():
    tokenizer = toy_tokenizer()
    told = tokenizer.encode(inputs.instruction())
    assert len(told) - 1 == inputs.INSTRUCTION_TOKENS  # the space at its end merges into a prompt
    for prompt in inputs.prompts(3, call=2):
        whole = len(tokenizer.encode(inputs.instruction() + prompt))
        assert whole == inputs.INSTRUCTION_TOKENS + inputs.PROMPT_TOKENS - 1  # one start for both


def test_no_call_repeats_a_prompt_of_the_one_before():
    assert not set(inputs.prompts(4, 0)) & set(inputs.prompts(4, 1))


def test_loops_have_short_prompts_and_one_empty_negative():
    made = inputs.loop(2, 4, 8, 30, 16)
    assert made["mask"].sum(1).tolist() == [inputs.PROMPT_TOKENS] * 2
    assert made["negative_mask"].sum(1).tolist() == [1, 1]
    np.testing.assert_array_equal(made["negative"][0], made["negative"][1])
    assert not made["captions"][~made["mask"]].any()
    again = inputs.loop(2, 4, 8, 30, 16)
    assert all((made[name] == again[name]).all() for name in made)
