"""A fine-tuning with pictures of the class, from the command's config to its end.

Its start is a tiny checkpoint, its data five pictures; buckets are those of two sizes.
"""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections.config_flags import config_flags

from sana_jax.batch.png import read
from sana_jax.checkpoints import native
from sana_jax.models import buckets
from sana_jax.runtime.errors import UserError
from sana_jax.training.checkpoints.manager import read_newest
from sana_jax.training.text_to_image import prior, start
from sana_jax.training.text_to_image.run import TextToImageTraining
from tests import mini
from tests.data.bad_files import encode
from tests.data.test_folder import make

ROOT = Path(__file__).parents[3]
CHANGES = {
    "data.caption": "a photo of sks dog",
    "prior.prompt": "a photo of a dog",
    "prior.images": 20,
    "prior.weight": 0.5,
    "data.size": 32,
    "recipe.steps": 6,
    "recipe.optimizer.learning_rate": 1e-2,
    "loop.log_every": 1,
    "loop.checkpoint_every": 2,
    "loop.images_every": 0,
    "images.num_steps": 1,
    "loader.threads": 1,
}


def finetune(folder: Path, **changes):
    """Returns the config of configs/finetune.py with CHANGES and with those by dotted keys."""
    parser = config_flags._ConfigFileParser("config")
    config = parser.parse(f"{ROOT}/configs/finetune.py:full")
    given = {"start": str(folder / "base"), "data.source": str(folder / "dogs")} | CHANGES
    given |= {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict({k: v for k, v in given.items() if v is not ...})
    return config


def patch(monkeypatch) -> None:
    """One device; a square and a wide bucket in the place of the published sizes."""
    monkeypatch.setattr(buckets, "training_buckets", lambda size: ((16, 64), (32, 32)))
    monkeypatch.setattr(start, "BASES", (32,))
    device = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *a: device)


@pytest.fixture(autouse=True)
def patched(monkeypatch):
    patch(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint, and five pictures, two of them wide, without captions."""
    folder = tmp_path_factory.mktemp("finetune")
    mini.save(folder / "base")
    (folder / "dogs").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(0, 256, (17, 60, 3) if i % 2 else (20, 22, 3), np.uint8)
        (folder / "dogs" / f"{i}.png").write_bytes(encode(pixels, "PNG"))
    return folder


@pytest.fixture(scope="module")
def unbroken(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch)
        TextToImageTraining(finetune(folder), str(workdir)).run()
    return workdir


def pictures(workdir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (workdir / "class_pictures").glob("*.png")}


def test_the_checkpoint_draws_the_class_in_the_sizes_of_the_data(unbroken):
    found = {}
    for name, content in pictures(unbroken).items():
        png = read(io.BytesIO(content))
        assert png.texts["prompt"] == "a photo of a dog"
        found[name] = png.size
    # Two of five pictures are wide: eight of twenty.
    assert sorted(found) == [f"{i:06d}_{i}.png" for i in range(20)]
    assert list(found.values()).count((16, 64)) == 8
    assert list(found.values()).count((32, 32)) == 12


def test_a_batch_is_half_of_the_class_in_one_size(folder, unbroken):
    loader = TextToImageTraining(finetune(folder), str(unbroken)).loader
    shapes = set()
    for step in range(5):
        batch = loader.batch(step)
        np.testing.assert_array_equal(batch["weight"], np.float32([2] * 4 + [1] * 4))
        shapes.add(batch["image"].shape[1:3])
        ours, theirs = batch["tokens"][:4], batch["tokens"][4:]
        assert (ours == ours[0]).all() and (theirs == theirs[0]).all()
        assert (ours[0] != theirs[0]).any()
    assert shapes == {(16, 64), (32, 32)}


def test_its_result_is_a_model_that_has_moved(folder, unbroken):
    model, base = (native.open_folder(at) for at in (unbroken / "model", folder / "base"))
    assert model.provenance["steps"] == 6 and model.provenance["start"] == "base"
    assert (model.dit, model.text_rows) == (base.dit, base.text_rows)
    assert model.flow_shift == base.flow_shift
    kernels = [np.asarray(at.params["dit"]["proj_out"]["kernel"]) for at in (model, base)]
    assert 0 < np.abs(kernels[0] - kernels[1]).max() < 0.1


RUN = """
import sys
from pathlib import Path
import pytest
from sana_jax.training.text_to_image.run import TextToImageTraining
from tests.training.text_to_image.test_prior import finetune, patch
folder, workdir = sys.argv[1:]
with pytest.MonkeyPatch.context() as monkeypatch:
    patch(monkeypatch)
    TextToImageTraining(finetune(Path(folder)), workdir).run()
"""


def kill_when(found: Path, folder: Path, workdir: Path) -> None:
    """Runs the training in a process of its own, and kills it once a file is there."""
    line = [sys.executable, "-c", RUN, str(folder), str(workdir)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(line, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    while not found.exists():
        assert run.poll() is None
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL


@pytest.mark.slow  # two processes that are killed, half a minute
def test_killed_while_it_draws_and_while_it_trains_it_ends_to_the_bit(folder, unbroken, tmp_path):
    kill_when(tmp_path / "class_pictures/000000_0.png", folder, tmp_path)
    drawn = pictures(tmp_path)
    assert 0 < len(drawn) < 20
    kill_when(tmp_path / "checkpoints/2", folder, tmp_path)
    assert pictures(tmp_path) == pictures(unbroken)
    TextToImageTraining(finetune(folder), str(tmp_path)).run()
    ours, theirs = (read_newest(at, "params")[0] for at in (tmp_path, unbroken))
    assert ours["step"] == theirs["step"] == 6
    assert ours["leaves"] == theirs["leaves"] and ours["iterators"] == theirs["iterators"]
    assert ours["data"] == theirs["data"] and ours["config"] == theirs["config"]


def test_a_run_goes_on_with_the_same_class_alone(folder, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    for changes, message in (
        (dict(prior__weight=1.0), "config.prior.weight: 0.5 -> 1.0"),
        (dict(prior__prompt="a cat"), "config.prior.prompt: a photo of a dog -> a cat"),
        (dict(data__caption="a dog"), "config.data.caption: a photo of sks dog -> a dog"),
        (dict(recipe__noise__shift=1.0), "config.recipe.noise.shift: 3.0 -> 1.0"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            TextToImageTraining(finetune(folder, **changes), str(run)).run()
    picture = run / "class_pictures/000003_3.png"
    content = picture.read_bytes()
    picture.write_bytes(pictures(run)["000004_4.png"])
    with pytest.raises(UserError, match="is of another run: data.source: "):
        TextToImageTraining(finetune(folder), str(run)).run()
    picture.unlink()
    with pytest.raises(UserError, match="000003_3.png is gone, with which the training began"):
        TextToImageTraining(finetune(folder), str(run))
    picture.write_bytes(content)
    TextToImageTraining(finetune(folder), str(run)).run()


def test_pictures_of_another_class_are_not_taken_for_these(folder, unbroken, tmp_path):
    shutil.copytree(unbroken / "class_pictures", tmp_path / "class_pictures")
    before = pictures(tmp_path)
    with pytest.raises(UserError, match="config.prior: .*of other settings .*'a cat'.*drawn anew"):
        TextToImageTraining(finetune(folder, prior__prompt="a cat"), str(tmp_path))
    assert pictures(tmp_path) == before


def test_a_class_of_several_prompts_is_drawn_in_turn(folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a cat", "source": 7}\n{"prompt": "a cow"}\n')
    several = {"prior.prompt": ..., "prior.prompts": str(prompts), "prior.images": 5}
    loader = TextToImageTraining(finetune(folder, **several), str(tmp_path / "run")).loader
    drawn = pictures(tmp_path / "run")
    texts = [read(io.BytesIO(drawn[name])).texts["prompt"] for name in sorted(drawn)]
    assert texts == ["a cat", "a cow", "a cat", "a cow", "a cat"]
    theirs = {batch["tokens"][4:].tobytes() for batch in map(loader.batch, range(5))}
    rows = {tuple(row) for step in range(5) for row in loader.batch(step)["tokens"][4:].tolist()}
    assert len(theirs) > 1 and len(rows) == 2

    prompts.write_text('{"prompt": "a cat", "seed": 7}\n')
    with pytest.raises(UserError, match="line 1: seed: of a class, lines give the prompt alone"):
        TextToImageTraining(finetune(folder, **several), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_each_prompt_of_a_class_has_a_picture_by_default(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prior, "IMAGES", 2)
    for count in 1, 5:
        (tmp_path / "prompts.txt").write_text("".join(f"cat {i}\n" for i in range(count)))
        several = {"prior.prompt": ..., "prior.prompts": str(tmp_path / "prompts.txt")}
        config = finetune(folder, **several, **{"prior.images": ..., "data.size": 32})
        TextToImageTraining(config, str(tmp_path / f"{count}"))
        assert len(pictures(tmp_path / f"{count}")) == max(2, count)


@pytest.mark.parametrize(
    "files, changes, message",
    [
        ({}, {}, "no image in it or below"),
        ({"a.png": b"<html>"}, {}, "a.png cannot be used: not_an_image"),
        ({"a.png": None, "b.png": b""}, {}, "b.png cannot be used: empty"),
        (
            {"a.png": None},
            {"data.caption": ...},
            "a.png cannot be used: bad_caption: it has no capt",
        ),
        (
            {"a.png": None},
            {"data.caption": "a {subject}"},
            "{subject} is no field; there are {name}",
        ),
        ({"a.png": None}, {"data.caption": "{caption}"}, "no caption of its own, for {caption}"),
        ({"a.png": None}, {"prior.prompt": ...}, "config.prior.prompt is missing: give the class"),
        ({"a.png": None}, {"prior.prompt": " "}, "config.prior.prompt is missing: give the class"),
        ({"a.png": None}, {"prior.prompts": "x.txt"}, "prompt and prompts are given"),
        (
            {"a.png": None},
            {"prior.prompt": ..., "prior.prompts": "nowhere.txt"},
            "config.prior.prompts=nowhere.txt: ",
        ),
        ({"a.png": None}, {"prior.images": 0}, "config.prior.images=0: give 1 to"),
        ({"a.png": None}, {"prior.weight": 0.0}, "config.prior.weight=0.0: give a positive"),
        ({"a.png": None}, {"recipe.batch_size": 3}, "config.recipe.batch_size=3: half of a batch"),
        ({"a.png": None}, {"data.source": "precomputed:x"}, "stored latents stay as they are"),
        ({"a.png": None}, {"start": "nowhere"}, "no checkpoint 'nowhere'"),
        ({"a.png": None}, {"start": None}, "config.start is missing"),
    ],
    ids=str,
)
def test_wrong_input_is_refused_before_anything_is_written(
    folder, tmp_path, files, changes, message
):
    data, whole = tmp_path / "data", (folder / "dogs/0.png").read_bytes()
    make(data, {name: whole if content is None else content for name, content in files.items()})
    data.mkdir(exist_ok=True)
    with pytest.raises(UserError, match=re.escape(message)):
        config = finetune(folder, **{"data.source": str(data)} | changes)
        TextToImageTraining(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
