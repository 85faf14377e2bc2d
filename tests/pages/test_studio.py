"""What the demo's form may ask for. That the files are those of `sample`: tests/test_demo.py."""

import dataclasses

import pytest

from sana_jax.batch.settings import Options
from sana_jax.pages.studio import Studio
from sana_jax.runtime.errors import UserError
from tests import mini


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studio") / "checkpoint"
    mini.save(folder)
    return Studio(Options(checkpoint=str(folder), out="", lora=()))


def test_the_form_begins_with_what_the_checkpoint_is_drawn_with(studio):
    form = studio.form
    assert (form["num_steps"], form["guidance_scale"], form["size"]) == (20, 4.5, mini.NATIVE_SIZE)
    assert form["multiple"] == mini.FACTOR and not form["is_sprint"]


def never(*_):
    raise AssertionError("nothing is drawn")


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(prompt=None), "prompt is missing"),
        (dict(prompt=5), "prompt=5: it takes a string"),
        (dict(seed="x"), "seed='x': it takes a whole number in 0 .. 18446744073709551615"),
        (dict(seed=2**64 - 1, count=2), "seeds count up"),
        (dict(num_steps=0), "num_steps=0: it takes a whole number in 1 .. 1000"),
        (dict(num_steps=1.5), "num_steps=1.5"),
        (dict(guidance_scale=-1), "guidance_scale=-1"),
        (dict(width=33), "width=33: it must be a multiple of 4; try 32 or 36"),
        (dict(height=10**6), "height=1000000: "),
        (dict(count=0), "count 0 is not a whole number in 1 .. 8"),
        (dict(count=9), "count 9"),
        (dict(image="/etc/passwd"), "guidance_scale, width, height, count"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_said_before_anybody_waits(studio, changes, words):
    with pytest.raises(UserError) as error:
        studio.draw({"prompt": "a", **changes}, never, never)
    assert words in str(error.value)


def test_the_command_is_quoted_for_a_shell(studio):
    command = studio.command({"prompt": "it's $HOME", "seed": 3, "count": 2, "negative_prompt": ""})
    assert """'--prompt=it'"'"'s $HOME' --seed=3 --num_images_per_prompt=2""" in command
    assert "negative" not in command and "--dtype" not in command and "--max_pixels" not in command


def test_the_command_has_all_that_decides_the_pictures(studio, monkeypatch):
    changes = {"clip_attention": False, "max_pixels": 4096}
    monkeypatch.setattr(studio, "_options", dataclasses.replace(studio._options, **changes))
    words = studio.command({"prompt": ""}).split()
    assert {"--prompt=", "--clip_attention=False", "--max_pixels=4096"} <= {*words}
