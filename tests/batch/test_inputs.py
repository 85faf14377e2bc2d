"""Pictures to start from: files that cannot be used, and runs that find what they have drawn."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from sana_jax import SanaPipeline
from sana_jax.batch import draw as batch
from sana_jax.batch import image_files
from sana_jax.batch.draw import draw
from sana_jax.batch.inputs import with_inputs
from sana_jax.batch.settings import Options
from sana_jax.batch.tasks import make_tasks
from sana_jax.runtime.errors import UserError
from tests import mini

COMMON = {"num_steps": 4, "guidance_scale": 1.0}
SIDE = 32


def picture(seed=0, height=SIDE, width=SIDE) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def half(height=SIDE, width=SIDE) -> np.ndarray:
    return np.where(np.arange(width) < width // 2, 0, 255).astype(np.uint8)[None].repeat(height, 0)


def save(path, pixels) -> str:
    Image.fromarray(pixels).save(path)
    return str(path)


def tasks_of(*rows, **common):
    rows = [(f"F line {i}: ", {"prompt": "a", **row}) for i, row in enumerate(rows, 1)]
    return make_tasks(rows, COMMON | common, 3, 1)


def test_a_picture_for_all_prompts_is_read_once(tmp_path, monkeypatch):
    image, seen, content = save(tmp_path / "a.png", picture()), [], image_files._content
    monkeypatch.setattr(image_files, "_content", lambda *a: seen.append(a) or content(*a))
    tasks = with_inputs(tasks_of(*[{}] * 50, image=image))
    assert len(seen) == 1 and len({id(task.inputs.image) for task in tasks}) == 1


def test_pictures_are_upright_and_on_white_and_masks_grey(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(picture(0, 32, 64)).save(tmp_path / "a.jpg", exif=exif)
    save(tmp_path / "m.png", np.full((64, 32, 3), (0, 255, 0), np.uint8))
    given = {"image": str(tmp_path / "a.jpg"), "mask": str(tmp_path / "m.png")}
    (task,) = with_inputs(tasks_of(given))
    assert (task.height, task.width) == (64, 32)
    assert (np.asarray(task.inputs.mask) == 150).all()
    (task,) = with_inputs(
        tasks_of({"image": save(tmp_path / "c.png", np.zeros((8, 8, 4), np.uint8))})
    )
    assert (np.asarray(task.inputs.image) == 255).all()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    mini.save(path)
    return str(path)


def run(checkpoint, out, tasks, **options) -> None:
    draw(tasks, Options(checkpoint, str(out), compilation_cache="", **options))


PNG = io.BytesIO()
Image.fromarray(picture()).save(PNG, "PNG")
FILES = {  # name -> content
    "a.png": PNG.getvalue(),
    "cut.png": PNG.getvalue()[:-200],
    "text.png": b"no picture",
    "empty.png": b"",
}


@pytest.mark.parametrize(
    "row, words",
    [
        (dict(image="absent.png"), "F line 1: image={}/absent.png: No such file"),
        (dict(image="folder"), "F line 1: image={}/folder is a folder, where a file is needed"),
        (dict(image="cut.png"), "F line 1: image={}/cut.png: it ends early"),
        (dict(image="text.png"), "F line 1: image={}/text.png: it is none of AVIF"),
        (dict(image="empty.png"), "F line 1: image={}/empty.png: there are no bytes"),
        (dict(image="a.png", mask="cut.png"), "F line 1: mask={}/cut.png: it ends early"),
        (
            dict(image="a.png", mask="wide.png"),
            "F line 1: mask={}/wide.png: it has 64 x 32 pixels, where its picture, {}/a.png, is"
            " 32 x 32 pixels (width x height)",
        ),
        (
            dict(image="a.png", mask="clear.png"),
            "F line 1: mask={}/clear.png: has transparent parts, which do not say what is redrawn",
        ),
        (dict(image="a.png", mask="dark.png"), "F line 1: mask={}/dark.png: redraws nothing: its"),
        (dict(image="odd.png"), "F line 1: image is 33 x 32 pixels (width x height), which are no"),
        (dict(image="a.png", width=64), "F line 1: width=64: the picture that is drawn has the"),
        (dict(image="a.png", max_pixels=100), "--height=32: 32 x 32 pixels are more than"),
        (dict(image="a.png", use_resolution_binning=True), "use_resolution_binning is for sizes"),
    ],
)
def test_files_that_cannot_be_used_are_named_and_nothing_is_written(
    checkpoint, tmp_path, row, words
):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    save(tmp_path / "wide.png", half(32, 64))
    save(tmp_path / "dark.png", half() // 255)
    save(tmp_path / "clear.png", half()[..., None].repeat(4, axis=-1))  # white, but for where clear
    save(tmp_path / "odd.png", picture(0, 32, 33))
    (tmp_path / "folder").mkdir()
    options = {k: row[k] for k in ("max_pixels", "use_resolution_binning") if k in row}
    row = {name: value for name, value in row.items() if name not in options}
    row |= {name: str(tmp_path / row[name]) for name in ("image", "mask") if name in row}
    with pytest.raises(UserError) as error:
        run(checkpoint, tmp_path / "out", tasks_of(row), **options)
    assert str(error.value).startswith(words.replace("{}", str(tmp_path)))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_second_run_finds_its_pictures_by_what_they_started_from(
    checkpoint, tmp_path, monkeypatch, capsys
):
    image, mask = save(tmp_path / "a.png", picture()), save(tmp_path / "m.png", half())
    rows = [{"image": image, "mask": mask}, {"height": SIDE, "width": SIDE}]
    out = tmp_path / "out"
    run(checkpoint, out, tasks_of(*rows))
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [line.get("image") for line in lines] == [image, None]
    assert [line.get("strength") for line in lines] == [0.6, None]
    assert len(lines[0]["mask_sha256"]) == 64 and not lines[1].keys() & image_files.SETTINGS
    (drawn,) = np.asarray(Image.open(out / "000000_3.png"))[None]
    np.testing.assert_array_equal(drawn[half() == 0], picture()[half() == 0])

    (out / "000000_3.png").unlink()  # drawn again, in the batch of before
    run(checkpoint, out, tasks_of(*rows))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == kept
    monkeypatch.setattr(batch, "_draw_missing", None)
    moved = save(tmp_path / "moved.png", picture())
    (tmp_path / "moved.png").write_bytes((tmp_path / "a.png").read_bytes())
    capsys.readouterr()
    run(
        checkpoint,
        out,
        tasks_of(*[row | ({"image": moved} if "image" in row else {}) for row in rows]),
    )
    assert "nothing to draw: 2 of 2 images are done" in capsys.readouterr().err

    save(tmp_path / "a.png", picture(1))
    with pytest.raises(UserError, match=r"000000_3.png is there.*image_sha256 '"):
        run(checkpoint, out, tasks_of(*rows))
    rows[0] = {"height": SIDE, "width": SIDE}
    with pytest.raises(UserError, match=re.escape("strength 0.6 -> None")):
        run(checkpoint, out, tasks_of(*rows[:1]))


def test_pictures_are_those_of_the_pipeline(checkpoint, tmp_path):
    images = [save(tmp_path / f"{i}.png", picture(i)) for i in range(3)]
    rows = [{"image": image, "strength": 0.5} for image in images]
    run(checkpoint, tmp_path / "out", tasks_of(*rows))
    manifest = (tmp_path / "out" / "manifest.jsonl").read_text()
    assert manifest.count('"mask_sha256": null') == 3
    pipe = SanaPipeline.from_pretrained(checkpoint, dtype="float32")
    for i in range(3):
        arguments = dict(COMMON, seed=3 + i, image=picture(i), strength=0.5, output="np")
        (alone,) = pipe("a", **arguments)
        found = np.asarray(Image.open(tmp_path / "out" / f"00000{i}_{3 + i}.png")).astype(int)
        assert np.abs(found - alone).max() <= 1


def test_one_batch_on_a_cpu_shows_the_steps_that_are_run(checkpoint, tmp_path, monkeypatch):
    image, totals = save(tmp_path / "a.png", picture()), []
    progress = batch.Progress

    class Seen(progress):
        def __init__(self, **options):
            totals.append((options["total"], options["unit"]))
            super().__init__(**options)

        def __exit__(self, *error):
            totals.append(self.n)
            super().__exit__(*error)

    monkeypatch.setattr(batch, "Progress", Seen)
    run(checkpoint, tmp_path / "out", tasks_of({"image": image, "strength": 0.5}))
    assert totals == [(2, "step"), 2]
