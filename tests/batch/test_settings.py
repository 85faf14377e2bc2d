"""No two pictures that may differ have one key."""

import dataclasses

import jax
import numpy as np
import pytest

from sana_jax import sharding
from sana_jax.batch import draw
from sana_jax.batch.manifest import key_of
from sana_jax.batch.settings import Options, copied, extras_of, settings_of, with_requests
from sana_jax.batch.tasks import Task, make_batches, make_tasks
from sana_jax.checkpoints.load import open_checkpoint
from sana_jax.checkpoints.loras import open_all
from sana_jax.checkpoints.peft import write_adapter
from sana_jax.models import buckets
from sana_jax.runtime.errors import UserError
from tests import mini


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    mini.save(path)
    return str(path)


# Options that differ from those of BASE, and with them every picture.
BASE = dict(instruction_file="one.txt", tile=(16, 8), dtype="float32")
CHANGES = dict(
    dtype="bfloat16",
    variant="bf16",
    instruction_file="two.txt",
    no_instruction=True,
    guidance_interval=(0.1, 0.9),
    sampler="flow_euler",
    flow_shift=2.0,
    use_resolution_binning=True,
    sequential_guidance=True,
    unconditional_mask="prompt",
    tile=(32, 8),
    clip_attention=True,
    batch_size=16,
    lora=("lora.safetensors:0.5",),
)
# The first two are in checkpoint_sha256; the others decide about no pixel.
EXEMPT = {"checkpoint", "revision", "out", "max_pixels", "overwrite", "grid", "compilation_cache"}
OF_SPRINT = {"angles"}  # test_draw_sprint.py changes them


def test_every_option_is_in_the_key_or_exempt(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("Think.")
    (tmp_path / "two.txt").write_text("Think twice.")
    dit = open_checkpoint(checkpoint).dit
    site = {"a": np.ones((dit.width, 2)), "b": np.ones((2, dit.latent_channels))}
    write_adapter(tmp_path / "lora.safetensors", {"proj_out": site}, dit)
    fields = {field.name for field in dataclasses.fields(Options)}
    assert fields == CHANGES.keys() | EXEMPT | OF_SPRINT and not CHANGES.keys() & EXEMPT
    drawn = [Task(i, f"{i}", i, height=64, width=64) for i in range(16)]

    def keys(sha256="a" * 64, **changes) -> set[str]:
        opts = Options(checkpoint, "out", **BASE | changes)
        pipe = draw.open_pipeline(checkpoint, dataclasses.replace(opts, variant=None))
        divisor = sharding.batch_divisor(pipe.mesh)
        batches = with_requests(make_batches(drawn, opts.batch_size, divisor), pipe, opts)
        loras = open_all(opts.lora, pipe.checkpoint)
        found = settings_of(batches, pipe, opts, sha256, loras)
        assert [*found] == [task.file for task in drawn]
        return {key_of(settings) for settings in found.values()}

    monkeypatch.setattr(buckets, "nearest", lambda height, width, native: (height, width))
    base = keys()
    assert base == keys() and len(base) == len(drawn)
    for name, value in CHANGES.items():
        assert not base & keys(**{name: value}), name
    assert not base & keys(sha256="b" * 64)
    mesh = sharding.make_mesh(devices=jax.devices()[:4])
    monkeypatch.setattr(sharding, "make_mesh", lambda: mesh)
    assert not base & keys()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not base & keys()


@pytest.mark.parametrize(
    "options, expected", [({}, [None, (1024, 896)]), ({"tile": (512, 448)}, [(512, 448)] * 2)]
)
def test_tile_is_that_of_each_picture(checkpoint, options, expected):
    options = Options(checkpoint, "out", **options)
    pipe = draw.open_pipeline(checkpoint, options)
    tasks = [Task(i, "a", i, height=2048, width=width) for i, width in enumerate((2048, 2052))]
    batches = with_requests(make_batches(tasks, 1, 8), pipe, options)
    found = settings_of(batches, pipe, options, "a" * 64)
    assert [settings["tile"] for settings in found.values()] == expected


@pytest.mark.parametrize(
    "row, common, words",
    [
        ({"height": 1002}, {}, "F line 1: height=1002: it must be a multiple of 4; try 1000 or"),
        ({}, {"height": 1002}, "--height=1002: it must be a multiple of 4; try 1000 or 1004"),
        ({}, {"width": 3}, "--width=3: it must be a multiple of 4; try 4"),
        ({"height": 2**17}, {}, "F line 1: height 131072 is not a whole number in 1 .. 65536"),
    ],
)
def test_bad_sizes_are_named_where_they_were_given(checkpoint, row, common, words):
    common = dict(negative_prompt="", num_steps=2, guidance_scale=4.5, height=64, width=64) | common
    tasks = make_tasks([("F line 1: ", {"prompt": "a", **row})], common, 0, 1)
    options = Options(checkpoint, "out")
    pipe = draw.open_pipeline(checkpoint, options)
    with pytest.raises(UserError) as error:
        with_requests(make_batches(tasks, 8, 8), pipe, options)
    assert str(error.value).startswith(words)


def test_other_fields_of_a_line_go_to_the_manifest_and_are_named():
    rows = [("", {"prompt": "a", "tag": 1}), ("", {"prompt": "b"}), ("", {"prompt": "c", "id": 2})]
    drawn = make_tasks(rows, {"num_steps": 2, "guidance_scale": 4.5}, 0, 2)
    found = extras_of(drawn, {task.file: {"sampler": ""} for task in drawn}, {})
    files = [task.file for task in drawn]
    tags, ids = dict.fromkeys(files[:2], {"tag": 1}), dict.fromkeys(files[4:], {"id": 2})
    assert found == tags | ids
    assert copied(found) == "'id', 'tag' of the prompts are copied into manifest.jsonl alone"


@pytest.mark.parametrize("name", ["file", "sha256", "key", "sampler", "checkpoint"])
def test_fields_of_the_manifest_are_refused_in_prompts(name):
    rows = [("", {"prompt": "a"}), ("F line 2: ", {"prompt": "a", name: "x"})]
    drawn = make_tasks(rows, {"num_steps": 2, "guidance_scale": 4.5}, 0, 1)
    with pytest.raises(UserError, match=f"^F line 2: {name} is a field of manifest.jsonl"):
        extras_of(drawn, {task.file: {"sampler": ""} for task in drawn}, {"checkpoint": "a"})
