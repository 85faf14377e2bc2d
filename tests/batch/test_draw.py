"""A folder of pictures, drawn by one run or by several, holds the same bytes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from sana_jax import SanaPipeline
from sana_jax.batch import draw as batch
from sana_jax.batch import outputs
from sana_jax.batch.draw import draw
from sana_jax.batch.settings import Options
from sana_jax.batch.tasks import make_tasks
from sana_jax.checkpoints.find import file_sha256
from sana_jax.checkpoints.load import open_checkpoint
from sana_jax.checkpoints.peft import write_adapter
from sana_jax.pipeline import denoise, request
from sana_jax.runtime.errors import Retry, UserError
from tests import mini

COMMON = {"negative_prompt": "", "num_steps": 2, "guidance_scale": 4.5, "height": 32, "width": 32}
# Two shapes, since one is not guided; three batches on eight devices.
ROWS = [
    ("", {"prompt": f"a thing number {i}", **extra})
    for i in range(20)
    for extra in [{"guidance_scale": 1.0} if i % 5 == 2 else {"negative_prompt": "x" * (i % 3)}]
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    mini.save(path)
    return str(path)


@pytest.fixture(scope="module")
def unbroken(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("unbroken")
    draw(tasks(), options(checkpoint, path))
    return path


def options(checkpoint, out, **kwargs) -> Options:
    return Options(checkpoint, str(out), compilation_cache="", **kwargs)


def tasks(rows=ROWS, seed=5, images_each=1, **common):
    return make_tasks(rows, {**COMMON, **common}, seed, images_each)


def contents(path) -> dict:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_pictures_are_those_of_the_pipeline(checkpoint, unbroken):
    pipe = SanaPipeline.from_pretrained(checkpoint, dtype="float32")
    assert len(contents(unbroken)) == 21
    for task in tasks()[::7]:
        settings = {name: getattr(task, name) for name in (*COMMON, "seed")}
        alone = pipe(task.prompt, output="np", **settings)[0]
        found = pixels(unbroken / task.file).astype(int)
        assert np.abs(found - alone).max() <= 1 and found.std() > 10


def test_manifest_says_what_was_drawn(checkpoint, unbroken):
    lines = [json.loads(x) for x in (unbroken / "manifest.jsonl").read_text().splitlines()]
    lines = {line["file"]: line for line in lines}
    assert lines.keys() == {task.file for task in tasks()}
    line = lines["000003_8.png"]
    expected = dict(ROWS[3][1], seed=8, height=32, width=32, num_steps=2, guidance_scale=4.5)
    expected |= dict(sampler="flow_dpm_solver", flow_shift=3.0, dtype="float32")
    expected |= dict(instruction_sha256=None, guidance_interval=None, checkpoint=checkpoint)
    expected |= dict(
        tile=None, batch_size=8, devices=8, platform="cpu", device_kind="cpu", step_by_step=False
    )
    assert expected.items() <= line.items()
    assert all(len(line[n]) == 64 for n in ("checkpoint_sha256", "key", "sha256"))


def test_sizes_and_tiles_are_resolved_once_a_batch(checkpoint, tmp_path, monkeypatch):
    calls = {"of": 0, "sizes": 0, "tiles": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(request.Request, "of", counted("of", request.Request.of))
    for name in "sizes", "tiles":
        monkeypatch.setattr(request, name, counted(name, getattr(request, name)))
    draw(tasks(), options(checkpoint, tmp_path))
    assert calls == {"of": 3, "sizes": 3, "tiles": 3}
    assert len([*tmp_path.glob("*.png")]) == 20


def test_padding_costs_no_compilation(checkpoint, unbroken, tmp_path):
    before = denoise.sample._cache_size()
    draw(tasks()[:9], options(checkpoint, tmp_path))
    assert denoise.sample._cache_size() == before


@pytest.mark.parametrize("lost", [[0], [3, 7, 12], [*range(20)]])
def test_resumed_run_gives_the_same_bits(checkpoint, unbroken, tmp_path, lost):
    expected = contents(unbroken)
    for name, content in expected.items():
        if name != "manifest.jsonl":
            (tmp_path / name).write_bytes(content)
    for task in tasks():
        if task.number in lost:
            (tmp_path / task.file).unlink()
    kept = expected["manifest.jsonl"].splitlines()[
        ::2
    ]  # every other line was not written before the kill
    (tmp_path / "manifest.jsonl").write_bytes(b"".join(x + b"\n" for x in kept) + b'{"fi')
    draw(tasks(), options(checkpoint, tmp_path))
    assert contents(tmp_path) == expected


def test_interrupted_run_continues(checkpoint, unbroken, tmp_path, monkeypatch):
    calls = 0

    def interrupted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return call(*args, **kwargs)

    call = SanaPipeline.draw
    monkeypatch.setattr(SanaPipeline, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(tasks(), options(checkpoint, tmp_path))
    found = contents(tmp_path)
    pictures = {name for name in found if name.endswith(".png")}
    assert {json.loads(x)["file"] for x in found["manifest.jsonl"].splitlines()} == pictures
    assert found.keys() - pictures == {"manifest.jsonl"} and len(pictures) < 20
    draw(tasks(), options(checkpoint, tmp_path))
    assert contents(tmp_path) == contents(unbroken)


def test_nothing_to_do_loads_nothing(checkpoint, unbroken, monkeypatch, capsys):
    monkeypatch.setattr(batch, "place_all", None)
    before = contents(unbroken)
    draw(tasks(), options(checkpoint, unbroken, grid=False))
    assert capsys.readouterr().err == "nothing to draw: 20 of 20 images are done\n"
    assert contents(unbroken) == before


@pytest.mark.parametrize(
    "change",
    [
        dict(sampler="flow_euler"),
        dict(dtype="bfloat16"),
        dict(instruction_file="instruction.txt"),
        dict(checkpoint="other"),
        dict(batch_size=16),
        dict(tile=(16, 8)),
    ],
)
def test_other_settings_are_refused(checkpoint, unbroken, tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "instruction.txt").write_text("Think.")
    if "checkpoint" in change:
        mini.save(tmp_path / "other", seed=1)
    before = contents(unbroken)
    with pytest.raises(UserError, match=r"000000_5.png and \d+ more are there"):
        draw(tasks(), dataclasses.replace(options(checkpoint, unbroken), **change))
    assert contents(unbroken) == before


def test_the_mask_of_guidance_s_other_half_is_a_setting_where_it_differs(
    checkpoint, unbroken, tmp_path
):
    mask = dict(unconditional_mask="prompt")
    draw(tasks()[:3], options(checkpoint, tmp_path, **mask))
    lines = [json.loads(x) for x in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [line.get("unconditional_mask") for line in lines] == ["prompt", "prompt", None]
    one, other = (pixels(path / tasks()[0].file).astype(int) for path in (tmp_path, unbroken))
    assert np.abs(one - other).max() > 1
    with pytest.raises(UserError, match="unconditional_mask 'prompt' -> None"):
        draw(tasks()[:3], options(checkpoint, tmp_path))
    with pytest.raises(UserError, match="unconditional_mask unknown -> 'prompt'"):
        draw(tasks(), options(checkpoint, unbroken, **mask))


def test_refusal_says_which_settings_differ(checkpoint, unbroken):
    with pytest.raises(UserError) as error:
        draw(tasks(), options(checkpoint, unbroken, batch_size=16, flow_shift=2))
    assert "(batch_size 8 -> 16, flow_shift 3.0 -> 2.0); use another" in str(error.value)


def test_defaults_are_settings_too(checkpoint, unbroken, monkeypatch):
    """What is given is the same picture as what is left to the checkpoint."""
    monkeypatch.setattr(batch, "place_all", None)
    draw(tasks(), options(checkpoint, unbroken, flow_shift=3, dtype="float32", no_instruction=True))


def test_one_batch_on_a_cpu_shows_its_steps(checkpoint, unbroken, tmp_path, monkeypatch):
    bars = []

    class Bar(batch.Progress):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(batch, "Progress", Bar)
    draw(tasks()[:2], options(checkpoint, tmp_path, grid=True))
    (bar,) = bars
    assert (bar.n, bar.total) == (2, 2) and "steps" in bar._line
    for task in tasks()[:2]:
        found, expected = (pixels(p / task.file).astype(int) for p in (tmp_path, unbroken))
        assert np.abs(found - expected).max() <= 1
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (64, 32)


def test_the_largest_pictures_come_first(checkpoint, tmp_path, monkeypatch):
    """Where memory does not suffice for them, that is known before hours of work."""
    rows = [("", {"prompt": "a", "height": side, "width": side}) for side in (32, 64, 32, 96)]
    drawn = []

    def record(due, dispatch, save):
        drawn.extend(batch.tasks[0].height for batch in due)
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "overlap", record)
    with pytest.raises(KeyboardInterrupt):
        draw(tasks(rows), options(checkpoint, tmp_path / "out"))
    assert drawn == [96, 64, 32]
    # In tiles 96 needs less than 64 at once: of the former the loop takes most.
    monkeypatch.setattr(batch, "LARGE", 64 * 64)
    monkeypatch.setattr(request, "LARGE", 64 * 64)
    monkeypatch.setattr(request, "LARGE_TILE", (32, 32))
    drawn.clear()
    with pytest.raises(KeyboardInterrupt):
        draw(tasks(rows), options(checkpoint, tmp_path / "out"))
    assert drawn == [64, 96, 32]


def test_device_out_of_memory(checkpoint, unbroken, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 34359738368 bytes."
        )

    monkeypatch.setattr(batch, "place_all", lambda *args: None)
    monkeypatch.setattr(SanaPipeline, "draw", fail)
    with pytest.raises(UserError) as error:
        draw(tasks(), options(checkpoint, tmp_path / "out"))
    for words in (
        "34359738368 bytes asked for",
        "--batch_size below 8",
        "--dtype=bfloat16",
        "--tile=",
    ):
        assert words in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad, drawn", [({2, 5}, True), (set(range(9)), False)])
def test_images_that_are_not_finite_are_not_saved(
    checkpoint, unbroken, tmp_path, monkeypatch, bad, drawn
):
    call = SanaPipeline.draw
    rows = [("--", {"prompt": "a", "seed": k}) for k in range(9)]

    def spoil(self, asked, on_step):
        images, finite = call(self, asked, on_step)
        return images, finite & np.array([number not in bad for number in asked.seeds.tolist()])

    monkeypatch.setattr(SanaPipeline, "draw", spoil)
    with pytest.raises(UserError, match=f"^{len(bad)} images, such as .* NaN .* another dtype"):
        draw(tasks(rows), options(checkpoint, tmp_path / "out"))
    saved = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert len(saved) == 9 - len(bad)
    monkeypatch.undo()
    if drawn:
        draw(tasks(rows), options(checkpoint, tmp_path / "out"))  # those that are missing
        assert len([*(tmp_path / "out").glob("*.png")]) == 9


def test_a_size_that_is_hopeless_is_not_in_the_way_of_others(checkpoint, tmp_path, monkeypatch):
    call = SanaPipeline.draw
    rows = [("", {"prompt": "a", "height": s, "width": s, "seed": s}) for s in (64,) * 3 + (32, 32)]

    def spoil(self, asked, on_step):
        images, finite = call(self, asked, on_step)
        return images, finite & (asked.height == 32)

    monkeypatch.setattr(batch, "HOPELESS", 2)
    monkeypatch.setattr(SanaPipeline, "draw", spoil)
    with pytest.raises(UserError, match="^3 images, such as .* of 64 x 64 pixels"):
        draw(tasks(rows), options(checkpoint, tmp_path / "out"))
    assert len([*(tmp_path / "out").glob("*.png")]) == 2


def test_other_errors_of_jax_are_bugs(checkpoint, unbroken, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("INTERNAL: something")

    monkeypatch.setattr(batch, "place_all", lambda *args: None)
    monkeypatch.setattr(SanaPipeline, "draw", fail)
    with pytest.raises(jax.errors.JaxRuntimeError):
        draw(tasks(), options(checkpoint, tmp_path / "out"))


def test_disk_that_fills_up(checkpoint, unbroken, tmp_path, monkeypatch):
    def write(path, content):
        if path.name.startswith("000012"):
            raise OSError(28, "No space left on device")
        return write_atomically(path, content)

    write_atomically = outputs.write_atomically
    monkeypatch.setattr(outputs, "write_atomically", write)
    with pytest.raises(Retry, match=r"No space left on device; \d+ of 20 images are done"):
        draw(tasks(), options(checkpoint, tmp_path))
    monkeypatch.undo()
    assert not any(p.name.endswith(".part") for p in tmp_path.iterdir())
    draw(tasks(), options(checkpoint, tmp_path))
    assert contents(tmp_path) == contents(unbroken)


@pytest.mark.parametrize(
    "common, changes, words",
    [
        (dict(height=30), {}, "--height=30: it must be a multiple of 4; try 28 or 32"),
        (dict(height=65536), {}, "--max_pixels=16777216"),
        (dict(height=96), dict(max_pixels=64 * 32), "--height=96: 96 x 32"),
        ({}, dict(use_resolution_binning=True), "there are no buckets for 64 px"),
        ({}, dict(checkpoint="absent"), "no checkpoint 'absent'"),
        ({}, dict(variant="bf16"), "which has no variants"),
        ({}, dict(instruction_file="absent"), "instruction file absent"),
        ({}, dict(tile=(16, 32)), "stride"),
        ({}, dict(flow_shift=1e-4), "--flow_shift 0.0001 is not a number in 0.001 .. 1000"),
        ({}, dict(flow_shift=1e4), "--flow_shift 10000.0"),
        (dict(height=2**16 + 4), dict(max_pixels=2**40), "height 65540 is not"),
    ],
)
def test_bad_options_write_nothing(checkpoint, tmp_path, monkeypatch, common, changes, words):
    monkeypatch.setattr(batch, "place_all", None)
    opts = dataclasses.replace(options(checkpoint, tmp_path / "out"), **changes)
    with pytest.raises(UserError) as error:
        draw(tasks(**common), dataclasses.replace(opts, overwrite=True))
    assert words in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_lora_draws_other_pictures_which_another_run_does_not_take_for_its_own(
    checkpoint, tmp_path
):
    dit, rng = open_checkpoint(checkpoint).dit, np.random.default_rng(0)
    site = {"a": rng.standard_normal((32, 2)), "b": rng.standard_normal((2, 8))}
    site = {half: array.astype(np.float32) for half, array in site.items()}
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for i, file in enumerate(files):
        write_adapter(file, {"proj_out": site}, dit, alpha=i + 1)
    out, few = tmp_path / "out", tasks()[:2]
    draw(few, options(checkpoint, out, lora=[f"{files[0]}:0.5"]))
    (line, *_) = map(json.loads, (out / "manifest.jsonl").read_text().splitlines())
    assert line["loras"] == [[file_sha256(files[0]), 0.5]]
    pipe = SanaPipeline.from_pretrained(checkpoint, dtype="float32")
    settings = {name: getattr(few[0], name) for name in (*COMMON, "seed")}
    plain = pipe(few[0].prompt, output="np", **settings)[0].astype(int)
    pipe.load_lora(str(files[0]), 0.5)
    alone = pipe(few[0].prompt, output="np", **settings)[0].astype(int)
    found = pixels(out / few[0].file).astype(int)
    assert np.abs(found - alone).max() <= 1 < np.abs(found - plain).max()
    for other in [], [f"{files[0]}:0.6"], [f"{files[1]}:0.5"]:
        with pytest.raises(UserError, match="of other settings .loras"):
            draw(few, options(checkpoint, out, lora=other))
    draw(few, options(checkpoint, out, lora=[f"{files[0]}:0.5"]))
