"""Which prompt a picture is scored against as a control."""

import jax.numpy as jnp
import pytest

from sana_jax.data.shapes_captions import prompts
from sana_jax.data.shapes_draw import draw
from sana_jax.errors import UserError
from sana_jax.metrics.shapes_parser import parse
from sana_jax.metrics.shapes_task import Options, another, figures, measure
from sana_jax.pipeline import SanaPipeline
from tests import mini


@pytest.mark.parametrize("count", [6, 8, 10])
def test_the_control_is_another_prompt_with_as_many_objects(count):
    asked = prompts(count)
    others = [another(k, count) for k in range(count)]
    assert sorted(others) == list(range(count))
    for k, other in enumerate(others):
        same = [j for j in range(count) if asked[j].facts["count"] == asked[k].facts["count"]]
        assert other in same and (other != k or same == [k])


def test_the_control_of_swapped_pictures_is_right():
    """Ten prompts: the last four pictures meet prompts with as many objects too."""
    asked = prompts(10)
    truth = [parse(draw(each.scene, 64, 64)) for each in asked]
    counts = [each.facts["count"] for each in asked]
    after = [
        next(j % 10 for j in range(k + 1, k + 11) if counts[j % 10] == counts[k]) for k in range(10)
    ]
    found = figures(asked, [truth[k] for k in after], truth, truth)
    assert found["control_shuffled"] == found["parser_overall"] == 1
    assert found["overall"] < 0.5
    assert figures(asked, truth, truth, truth)["control_shuffled"] < 0.5
    assert figures(asked[:4], truth[:4], truth[:4], truth[:4])["control_shuffled"] is None


def test_drawn_pictures_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    """8 bits would hide it."""
    mini.save(tmp_path)

    def diverged(pipe, prompts, **settings):
        return jnp.full((len(prompts), 64, 64, 3), jnp.nan)

    monkeypatch.setattr(SanaPipeline, "__call__", diverged)
    with pytest.raises(UserError, match="draws some pictures with NaN or infinite"):
        measure(str(tmp_path), Options(count=4, batch_size=8))
