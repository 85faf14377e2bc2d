"""A folder of Sana-Sprint's pictures: resumed to the bit, and refused where settings are others."""

import json

import numpy as np
import pytest
from PIL import Image

from sana_jax import SanaPipeline
from sana_jax.batch.draw import draw
from sana_jax.batch.settings import Options
from sana_jax.batch.tasks import make_tasks
from sana_jax.diffusion import scm
from sana_jax.models.dit import SPRINT
from sana_jax.runtime.errors import UserError
from tests import mini

COMMON = {"negative_prompt": "", "guidance_scale": 4.5, "height": 32, "width": 32}
ROWS = [("", {"prompt": f"a thing number {i}", "guidance_scale": 1 + i % 5}) for i in range(12)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    mini.save(path, **SPRINT)
    return str(path)


def run(checkpoint, out, rows=ROWS, common=None, **options):
    tasks = make_tasks(rows, COMMON | (common or {}), 5, 1)
    draw(tasks, Options(checkpoint, str(out), compilation_cache="", **options))
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_broken_run_ends_as_an_unbroken_one(checkpoint, tmp_path):
    whole = run(checkpoint, tmp_path / "out")
    lines = [json.loads(line) for line in whole["manifest.jsonl"].splitlines()]
    assert {line["num_steps"] for line in lines} == {2} and len(lines) == 12
    assert lines[0]["angles"] == list(scm.PAPER[2]) and lines[0]["flow_shift"] is None
    assert {line["sampler"] for line in lines} == {"scm"}
    for name in sorted(whole)[3:7]:
        (tmp_path / "out" / name).unlink()
    assert run(checkpoint, tmp_path / "out") == whole
    pipe = SanaPipeline.from_pretrained(checkpoint, dtype="float32")
    alone = pipe("a thing number 8", seed=13, guidance_scale=4, height=32, width=32, output="np")
    with Image.open(tmp_path / "out" / "000008_13.png") as image:
        found = np.asarray(image, int)
    assert np.abs(found - alone[0]).max() <= 1 and found.std() > 10
    with pytest.raises(UserError, match="of other settings .*angles"):
        run(checkpoint, tmp_path / "out", angles="diffusers")


def test_angles_set_the_number_of_steps(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "out", ROWS[:1], angles=[1.5, 1.0, 0.5, 0.0])
    line = json.loads((tmp_path / "out" / "manifest.jsonl").read_text())
    assert line["num_steps"] == 3 and line["angles"] == [1.5, 1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    "row, common, options, words",
    [
        ({"negative_prompt": "x"}, {}, {}, "F line 1: negative_prompt is of no use to Sana-Sprint"),
        ({}, {"negative_prompt": "x"}, {}, "--negative_prompt is of no use to Sana-Sprint"),
        ({}, {}, {"flow_shift": 3.0}, "--flow_shift is not for Sana-Sprint"),
        ({"num_steps": 3}, {}, {"angles": [1.5, 0.0]}, "F line 1: num_steps 3: the angles are"),
    ],
)
def test_bad_input_is_told_by_its_place(checkpoint, tmp_path, row, common, options, words):
    rows = [("F line 1: ", {"prompt": "a", **row})]
    with pytest.raises(UserError) as error:
        run(checkpoint, tmp_path / "out", rows, common, **options)
    assert str(error.value).startswith(words) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
