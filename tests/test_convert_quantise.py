"""convert --quantise, as a command, and the commands that take its result."""

import json

import jax
import numpy as np
import pytest

from sana_jax.checkpoints import native
from tests import mini
from tests.commands import answers, several
from tests.test_evaluate import environment


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    path = tmp_path_factory.mktemp("shared")
    mini.save(path / "float32")
    lines = [
        ["--source=float32", "--out=w8a8", "--quantise=w8a8", "--dtype=bfloat16"],
        [
            *("--source=float32", "--out=changed", "--quantise=w8"),
            *("--quantise_layer=dit/blocks/ffn/.*=w8a8", "--quantise_layer=(vae|dit)/.*=none"),
        ],
    ]
    for status, _, told in several("sana_jax.convert", lines, path, environment(path)):
        assert status == 0, told
    return path


def test_the_folder_holds_int8_and_the_rest_in_the_dtype(shared):
    made = native.open_folder(shared / "w8a8")
    kinds = {str(x.dtype) for x in jax.tree.leaves(made.params)}
    assert kinds == {"int8", "float32", "bfloat16"}
    assert dict(made.dit.quantised)["blocks/ffn/expand"] == "w8a8"
    size = {
        name: sum(file.stat().st_size for file in (shared / name).glob("*.safetensors"))
        for name in ("float32", "w8a8")
    }
    assert size["w8a8"] < 0.4 * size["float32"]


def test_flags_change_the_table(shared):
    made = native.open_folder(shared / "changed")
    assert made.dit.quantised == (("blocks/ffn/contract", "w8a8"), ("blocks/ffn/expand", "w8a8"))
    assert made.vae.quantised == () and len(made.text_encoder.quantised) == 8
    told = json.loads((shared / "changed" / "model.json").read_text())["provenance"]["quantised"]
    assert told["changes"][0] == ["dit/blocks/ffn/.*", "w8a8"]


def test_converting_again_keeps_it_and_mistakes_are_named(shared):
    quantised, plain = "--source=w8a8", "--source=float32"
    (shared / "image.jsonl").write_text('{"prompt": "red circle", "image": "a.png"}\n')
    mistakes = [
        ((quantised, "--out=a", "--quantise=w8"), ("is quantised already",)),
        ((quantised, "--out=b", "--format=diffusers"), ("diffusers", "quantised", "dit")),
        ((quantised, "--out=c", "--grow=4", "--keep=1"), ("--grow", "quantised")),
        ((quantised, "--out=m", "--dense_time"), ("--dense_time", "quantised")),
        ((plain, "--out=d", "--quantise=w8", "--format=diffusers"), ("--format=diffusers",)),
        ((plain, "--out=e", "--quantise_layer=dit/.*=w8"), ("--quantise_layer", "--quantise")),
        ((plain, "--out=f", "--quantise=w8", "--quantise_layer=dit"), ("PATTERN=KIND",)),
        ((plain, "--out=g", "--quantise=w8", "--quantise_layer=dot/.*=w8"), ("no layer", "dot/")),
        ((plain, "--out=h", "--quantise=w8", "--quantise_layer=dit/.*=w4"), ("none, w8, w8a8",)),
        ((plain, "--out=i", "--quantise=w8", "--quantise_layer=vae/.*=w8a8"), ("give w8",)),
        ((plain, "--out=k", "--quantise=w8", "--calibrate=p.txt"), ("--quantise=w8a8",)),
        ((plain, "--out=l", "--quantise=w8a8", "--calibrate=p.txt"), ("--calibrate=p.txt",)),
        ((plain, "--out=o", "--quantise=w8a8", "--smooth=p.txt"), ("--smooth=p.txt",)),
        ((plain, "--out=p", "--quantise=w8a8", "--smooth=image.jsonl"), ("line 1", "--smooth")),
        ((plain, "--out=n", "--quantise=w8", "--smooth=p.txt"), ("--smooth", "--quantise=w8a8")),
        ((plain, "--out=j", "--quantise=w8", "--quantise_layer=(=w8"), ("'('",)),
    ]
    given = answers("sana_jax.convert", mistakes, [], shared, environment(shared))
    for arguments, words in mistakes:
        status, _, told = given[arguments]
        lines = [line for line in told.splitlines() if "B/s" not in line]
        assert status == 2 and len(lines) == 1, told
        assert all(word in lines[0] for word in words), (lines[0], words)
        assert not (shared / arguments[1].removeprefix("--out=")).exists()
    again = [quantised, "--out=again", "--dtype=float32"]
    ((status, _, told),) = several("sana_jax.convert", [again], shared, environment(shared))
    assert status == 0, told
    first, second = (native.open_folder(shared / name) for name in ("w8a8", "again"))
    for before, now in zip(*map(jax.tree.leaves, (first.params, second.params)), strict=True):
        assert now.dtype == ("int8" if before.dtype == "int8" else "float32")
        np.testing.assert_array_equal(np.asarray(before, np.float32), np.asarray(now, np.float32))


@pytest.mark.slow
def test_prompts_calibrate_and_smooth(shared):
    (shared / "prompts.jsonl").write_text('{"prompt": "red circle", "num_steps": 2}\n')
    flags = ["--source=float32", "--out=static", "--quantise=w8a8"]
    flags += ["--smooth=prompts.jsonl", "--calibrate=prompts.jsonl"]
    ((status, _, told),) = several("sana_jax.convert", [flags], shared, environment(shared))
    assert status == 0, told
    made = native.open_folder(shared / "static")
    assert {kind for _, kind in made.dit.quantised} == {"w8a8_static"}
    told = made.provenance["quantised"]
    assert told["calibration"] == told["smoothing"] == {"prompts": 1}


@pytest.mark.slow
def test_sample_and_evaluate_take_it_by_name(shared):
    env = environment(shared)
    flags = ["--checkpoint=w8a8", "--prompt=red circle", "--out=drawn", "--num_steps=2"]
    ((status, _, told),) = several("sana_jax.sample", [flags], shared, env)
    assert status == 0 and [*(shared / "drawn").glob("*.png")], told
    flags = ["--task=shapes", "--checkpoint=w8a8", "--count=2", "--num_steps=2", "--batch_size=2"]
    ((status, printed, told),) = several("sana_jax.evaluate", [flags], shared, env)
    assert status == 0, told
    assert json.loads(printed.splitlines()[-1])["prompts"] == 2
