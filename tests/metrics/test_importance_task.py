"""The task as evaluate calls it; what importance is, tests/models/test_importance.py says."""

import dataclasses
import json

import numpy as np
import pytest

from sana_jax.checkpoints import native
from sana_jax.checkpoints.depth import grow
from sana_jax.metrics.importance_task import Options, measure, rows_of, table, transformer_sha256
from sana_jax.models.dit import SPRINT
from sana_jax.runtime.errors import UserError
from sana_jax.shapes import captions
from tests import mini

SHORT = Options(num_steps=2, guidance_scale=2.0, count=3, batch_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of two blocks, and the same with two more that are new."""
    path = tmp_path_factory.mktemp("checkpoints")
    mini.save(path / "small", depth=2)
    native.save(grow(native.open_folder(path / "small"), 4, keep=2), path / "grown")
    return path


@pytest.fixture(scope="module")
def found(folder):
    return measure(str(folder / "small"), SHORT)


def write_prompts(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_it_is_the_mean_over_prompts_and_steps(folder, found, tmp_path):
    """The devices compute a batch of eight; the copies that fill it do not count."""
    alone = []
    for i, picture in enumerate(found["pictures"]):
        file = write_prompts(tmp_path / f"{i}.jsonl", picture)
        alone.append(measure(str(folder / "small"), dataclasses.replace(SHORT, prompts=file)))
    assert [each["evaluations"] for each in alone] == [2, 2, 2] and found["evaluations"] == 6
    numbers = np.array([each["importance"] for each in alone])
    assert (np.ptp(numbers, axis=0) > 1e-6).all()
    np.testing.assert_allclose(found["importance"], numbers.mean(axis=0), rtol=1e-4)


def test_new_blocks_have_none_and_the_others_keep_theirs(folder, found):
    grown = measure(str(folder / "grown"), SHORT)
    np.testing.assert_allclose(grown["importance"][:2], found["importance"], rtol=1e-5)
    assert grown["importance"][2:] == [0, 0] and min(found["importance"]) > 0
    assert (grown["depth"], found["depth"]) == (4, 2)
    assert grown["sha256"] != found["sha256"]


def test_noise_levels_guidance_and_shift_matter(folder, found):
    for change in ({"num_steps": 3}, {"guidance_scale": 9.0}, {"flow_shift": 1.0}):
        other = measure(str(folder / "small"), dataclasses.replace(SHORT, **change))
        assert other["importance"] != found["importance"], change
        assert other["options"] == dataclasses.asdict(dataclasses.replace(SHORT, **change))
    assert other["flow_shift"] == 1 and found["flow_shift"] == 3


def test_sprint_is_measured_at_the_states_of_its_own_steps(tmp_path):
    mini.save(tmp_path, depth=2, **SPRINT)
    usual = dataclasses.replace(SHORT, num_steps=None, guidance_scale=None)
    found = measure(str(tmp_path), usual)
    assert found["evaluations"] == 2 * 3 and found["flow_shift"] is None
    assert (found["options"]["num_steps"], found["options"]["guidance_scale"]) == (2, 4.5)
    assert min(found["importance"]) > 0
    other = measure(str(tmp_path), dataclasses.replace(usual, guidance_scale=1.0))
    assert other["importance"] != found["importance"]


def test_the_figures_say_what_they_were_measured_on(folder, found):
    checkpoint = native.open_folder(folder / "small")
    assert found["sha256"] == transformer_sha256(checkpoint)
    asked = [each.text for each in captions.prompts(3, 0)]
    assert [each["prompt"] for each in found["pictures"]] == asked
    assert [each["seed"] for each in found["pictures"]] == [0, 1, 2]
    assert found["checkpoint"] == str(folder / "small") and found["instruction"] is None
    json.dumps(found, allow_nan=False)


def test_a_copy_in_another_type_has_the_same_hash(folder):
    checkpoint = native.open_folder(folder / "small")
    arrays = {"dit": _arrays(checkpoint.params["dit"], np.float64)}
    copy = dataclasses.replace(checkpoint, params=arrays)
    assert transformer_sha256(copy) == transformer_sha256(checkpoint)
    arrays["dit"]["proj_out"]["bias"][0] += 1e-3
    assert transformer_sha256(copy) != transformer_sha256(checkpoint)


def _arrays(tree, dtype):
    if isinstance(tree, dict):
        return {key: _arrays(value, dtype) for key, value in tree.items()}
    return np.asarray(tree, dtype)


def test_prompts_are_the_first_of_a_file(tmp_path):
    file = write_prompts(tmp_path / "p.jsonl", *({"prompt": word} for word in "abc"))
    assert [row["prompt"] for _, row in rows_of(Options(file, count=2))] == ["a", "b"]
    assert len(rows_of(Options(file, count=9))) == 3


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": "a", "num_steps": 0}, "num_steps=0"),
        ({"prompt": "a", "width": 66}, r"line 1: width=66: it must be a multiple of 4"),
        ({"prompts": "a"}, "did you mean prompt?"),
        ({"prompt": "a", "image": "b.png"}, "line 1: image=.*/b.png: importance .* noise alone"),
    ],
)
def test_prompts_that_cannot_be_drawn_are_refused(folder, tmp_path, row, words):
    file = write_prompts(tmp_path / "p.jsonl", row)
    with pytest.raises(UserError, match=words):
        measure(str(folder / "small"), dataclasses.replace(SHORT, prompts=file))


def test_weights_that_overflow_and_an_autoencoder_alone_are_refused(folder, tmp_path):
    native.save(mini.alone(folder / "small"), tmp_path / "alone")
    with pytest.raises(UserError, match="lacks dit, text_encoder"):
        measure(str(tmp_path / "alone"), SHORT)
    checkpoint = native.open_folder(folder / "small")
    dit = _arrays(checkpoint.params["dit"], np.float32)
    dit["blocks"]["ffn"]["contract"]["kernel"] *= np.float32(3e38)
    checkpoint.params["dit"] = dit
    native.save(checkpoint, tmp_path / "overflowing")
    with pytest.raises(UserError, match="NaN or infinite"):
        measure(str(tmp_path / "overflowing"), SHORT)


def test_the_table_ranks_the_blocks():
    lines = table({"importance": [0.25, 0.0, 0.5]}).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["0", "0.25000", "2"],
        ["1", "0.00000", "3"],
        ["2", "0.50000", "1"],
    ]
