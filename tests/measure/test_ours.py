"""What is timed is the work that is named."""

import numpy as np
import pytest

from sana_jax.measure import inputs
from sana_jax.measure.inputs import PARTS, Settings
from sana_jax.measure.ours import Ours, count, make_pipeline
from sana_jax.models import flops
from tests.toy import relative_error


def settings(part, **changes):
    values = dict(preset="tiny", part=part, batch=1, size=64, dtype="float32", steps=2)
    return Settings(**values | changes)


def test_the_instruction_has_the_tokens_it_claims():
    tokenizer = inputs.checkpoint(settings("text")).tokenizer
    assert len(tokenizer.encode(inputs.instruction().rstrip())) == inputs.INSTRUCTION_TOKENS


def test_prompts_have_one_length_and_never_return():
    tokenizer = inputs.checkpoint(settings("text")).tokenizer
    calls = [inputs.prompts(2, call) for call in range(10)]
    texts = [text for call in calls for text in call]
    assert len(set(texts)) == len(texts)
    lengths = {len(tokenizer.encode(inputs.instruction() + text)) for text in texts}
    assert lengths == {inputs.INSTRUCTION_TOKENS + inputs.PROMPT_TOKENS - 1}


def test_counts_follow_batch_and_steps():
    pipe = make_pipeline(settings("loop"))
    one = count(pipe, settings("trunk"))
    assert one == 2 * flops.trunk(pipe.checkpoint.dit, 2, 2, 300)
    again = 2 * flops.denoise(pipe.checkpoint.dit, 2, 2, 300)
    assert 0 < again < one and count(pipe, settings("loop", steps=5)) == one + 4 * again
    for part in PARTS:
        assert count(pipe, settings(part, batch=3)) == 3 * count(pipe, settings(part))


def test_sprint_evaluates_its_network_once_a_step():
    pipe = make_pipeline(settings("loop", preset="tiny_sprint"))
    one = flops.trunk(pipe.checkpoint.dit, 2, 2, 300)
    assert count(pipe, settings("trunk", preset="tiny_sprint")) == one
    again = flops.denoise(pipe.checkpoint.dit, 2, 2, 300)
    assert count(pipe, settings("loop", preset="tiny_sprint")) == one + again


def test_kernels_are_of_the_settings():
    for name in "auto", "xla", "pallas":
        pipe = make_pipeline(settings("trunk", implementation=name))
        assert pipe.dit.implementation == name


def test_only_the_prompt_counts_behind_the_instruction():
    """A first call, without anything kept, counts as its two pieces."""
    config = inputs.checkpoint(settings("text")).text_encoder
    whole = flops.text(config, 241)
    prompt = count(make_pipeline(settings("text")), settings("text"))
    hidden = 4 * config.num_layers * 222 * 19 * config.num_heads * config.head_dim
    assert prompt == flops.text(config, 19, before=222)
    assert flops.text(config, 222) + prompt + hidden == whole


@pytest.mark.parametrize("part", ["text", "loop"])
def test_a_part_is_what_the_pipeline_gives(part):
    """The loop is a whole call whose prompts are encoded already."""
    ours = Ours(settings(part, batch=2))
    ours.load()
    found = ours.to_numpy(ours.run(3))
    if part == "text":
        prompts, text = inputs.prompts(2, 3), inputs.instruction()
        expected, mask = ours.pipe.encode_prompt(prompts, text)
        assert mask.sum(axis=1).tolist() == [20, 20]  # <bos> and 19 words
    else:
        given = inputs.loop(2, 2, 32, 300, 48)
        pipe = make_pipeline(settings("loop"))
        pipe.params["dit"] = ours.pipe.params["dit"]
        rows, mask = given["negative"], given["negative_mask"]
        pipe._encode_negative = lambda prompts: (rows[:1], mask[:1])
        expected = pipe(
            prompt_embeddings=given["captions"],
            prompt_mask=given["mask"],
            latents=given["latents"],
            height=64,
            width=64,
            num_steps=2,
            output="latent",
        )
    np.testing.assert_array_equal(found, np.asarray(expected))


def test_peak_is_a_rate():
    assert 1e9 < Ours(settings("trunk")).peak_flops() < 1e16


def test_quantised_weights_run_as_they_are_stored():
    sides = [Ours(settings("trunk", quantise=method)) for method in (None, "w8a8")]
    for side in sides:
        side.load()
    first, second = (side.run(0) for side in sides)
    assert 1e-4 < relative_error(second, first) < 0.03
    sizes = [side.describe()["weight_bytes"] for side in sides]
    assert sizes[1] < 0.6 * sizes[0]
