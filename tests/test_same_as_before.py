"""What was made before goes on as it did: configs, flags, pictures, native folders, trainings.

tests/golden/ holds what commit 94a800c gave; golden/make.py says how. XLA's last bits differ among
machines and versions, so what it computes has a tolerance, with its reason; all else is exact.
"""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags
from PIL import Image
from safetensors.numpy import load_file

from sana_jax.checkpoints import native
from sana_jax.data.folder import Folder
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.models.dit import SanaConfig
from sana_jax.shapes.builder import record
from sana_jax.training.autoencoder import recipe as autoencoder_recipe
from sana_jax.training.autoencoder.run import AutoencoderTraining
from sana_jax.training.checkpoints.manager import read_newest
from sana_jax.training.text_to_image import recipe as text_to_image_recipe
from sana_jax.training.text_to_image.run import TextToImageTraining
from tests import xla

ROOT, GOLDEN = Path(__file__).parents[1], Path(__file__).parent / "golden"

# A command's name of then -> its module now.
NAMES = "sample train train_dc_ae precompute convert evaluate benchmark compile random_checkpoint"
COMMANDS = {name: f"sana_jax.{name}" for name in NAMES.split()} | {
    "data.shapes": "sana_jax.make_shapes",
    "data.tokenizer": "sana_jax.train_tokenizer",
}

# Of the autoencoder and the transformer that are trained.
BLOCKS = ("ResBlock", "ResBlock", "EfficientViTBlock")
CHANNELS, LAYERS, SCALES = (4, 4, 8), (0, 1, 1), ((),) * 3
AUTOENCODER = DCAEConfig(
    *(3, 4, 8),  # channels of images and latents, width of a head
    *(BLOCKS, BLOCKS, CHANNELS, CHANNELS, LAYERS, LAYERS, SCALES, SCALES),
    decoder_norms=("rms_norm",) * 3,
    decoder_activations=("silu",) * 3,
)
# Channels of latents, depth, width, width of a head, heads, channels of captions.
TRANSFORMER = SanaConfig(4, 1, 16, 8, 1, 16, mlp_ratio=1.0, sample_size=4)
STEPS, STOPPED, BATCH = 6, 3, 8  # of the training that is resumed; the last phase of two
# Softmax ignores a bias of all keys: its gradient is rounding, which CAME makes as large as others.
NOISE = "cross_attention/kv/bias"
# Of norms. Between LLVM's optimizations and none, parameters differed by 9e-6 and CAME's state by
# 3e-4, for it makes the least of gradients as large as the others.
TOLERANCES = {"params": 1e-4, "ema": 1e-4, "opt_state": 3e-3}


def expected(name: str):
    return json.loads((GOLDEN / name).read_text())


def config_keys(path: Path) -> dict[str, str]:
    """Dotted key -> its value, or the type that it takes where there is none."""

    def flat(config: ConfigDict, prefix: str = ""):
        for key, value in config.items():
            if isinstance(value, ConfigDict) and len(value):
                yield from flat(value, f"{prefix}{key}.")
            else:
                kind = f" ({config.get_type(key).__name__})" if value is None else ""
                yield prefix + key, f"{value!r}{kind}"

    return dict(flat(config_flags._ConfigFileParser("config").parse(str(path))))


COLLECT = """
import contextlib, io, json, runpy, sys
from absl import flags

found, F = {}, flags.FLAGS
for command, module in json.loads(sys.argv[1]).items():
    sys.argv, before = ["", "--help"], set(F)
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    groups = F.flags_by_module_dict().items()  # by names of modules, and the command's own file
    ours = [flag for module, group in groups if "sana_jax" in module for flag in group]
    found[command] = {
        flag.name: {
            "type": flag.flag_type(),
            "takes": flag.parser.syntactic_help,
            "choices": list(getattr(flag.parser, "enum_values", [])),
            "default": flag.default,
        }
        for flag in ours
    }
    for name in set(F) - before:
        delattr(F, name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "sana_jax"]:
        del sys.modules[name]  # or a module that two commands import defines flags for one alone
print(json.dumps(found))
"""


def command_flags() -> dict[str, dict]:
    """Command -> flag -> what it takes, and its default; of all commands in one process."""
    line = [sys.executable, "-W", "ignore", "-c", COLLECT, json.dumps(COMMANDS)]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def shapes_records() -> dict[str, list[str]]:
    """Split, seed, number and size -> hashes of a record's pixels, and of its captions."""
    found = {}
    for number in range(48):
        split, seed = ("train", "test")[number % 2], (0, 7)[number // 24]
        size = (64, 64) if number % 3 else (48, 80)
        made = record((seed, number), split, *size)
        with Image.open(io.BytesIO(made["image"])) as image:
            pixels = image.tobytes()
        told = {name: made[name] for name in ("key", "captions", "scores", "truth")}
        told = json.dumps(told | {"scores": [round(float(s), 2) for s in made["scores"]]})
        hashes = [hashlib.sha256(data).hexdigest()[:16] for data in (pixels, told.encode())]
        found[f"{split} {seed} {number} {size[0]}x{size[1]}"] = hashes
    return found


PROMPTS = [
    {"prompt": "a large red circle above a small blue square", "width": 96},
    {"prompt": "two green stars", "width": 96, "seed": 5},
    {"prompt": "a yellow ring left of a purple triangle", "guidance_scale": 1.0},
    {"prompt": "a white heart", "guidance_scale": 1.0, "negative_prompt": "blue"},
]


def sample(out: Path) -> subprocess.CompletedProcess:
    """The bundled model's pictures of PROMPTS, in two batches: with guidance, and without."""
    prompts = out.with_suffix(".jsonl")
    prompts.write_text("\n".join(map(json.dumps, PROMPTS)))
    line = [sys.executable, "-m", COMMANDS["sample"], "--checkpoint=shapes", f"--out={out}"]
    line += [f"--prompts={prompts}", "--num_steps=3", "--dtype=float32", "--compilation_cache="]
    environment = os.environ | {"XLA_FLAGS": xla.flags(devices=1)}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)


def text_to_image(folder: Path) -> TextToImageTraining:
    """A training whose checkpoints are in `folder`; base/ and photos/ are in the current one."""
    config = text_to_image_recipe.text_to_image(TRANSFORMER, steps=STEPS, batch_size=BATCH)
    config.autoencoder = config.text_encoder.checkpoint = "base"
    config.text_encoder.rows = 8
    config.dtype = "float32"
    config.data.update(source="photos", crop="random", flip=True)
    config.data.captions.kind = "uniform"
    config.recipe.optimizer.update(warmup_steps=2, learning_rate=3e-3)
    config.loader.update(threads=1, prefetch=1)
    config.loop.update(log_every=1, checkpoint_every=STOPPED)
    return TextToImageTraining(config, str(folder))


def autoencoder(folder: Path) -> AutoencoderTraining:
    """As above; two phases, of which the second has a discriminator."""
    config = autoencoder_recipe.autoencoder(AUTOENCODER)
    config.data.source = "photos"
    config.dtype = "float32"
    config.perceptual.name = "laplacian"
    config.discriminator.update(width=4, layers=1)
    config.evaluation.update(images=BATCH, batch_size=BATCH, sizes=(16,))
    config.scale_images = BATCH
    config.loader.update(threads=1, prefetch=1, cache_gib=0.0)
    config.loop.update(log_every=1, checkpoint_every=STOPPED, images_every=0)
    config.run = ("low_resolution", "local_refinement")
    for phase in config.run:
        config.phases[phase].update(steps=STEPS, batch_size=BATCH, image_size=16, crop="random")
        config.phases[phase].autoencoder.learning_rate = 3e-3
    return AutoencoderTraining(config, str(folder))


# Training -> what makes it, and the folder in it whose checkpoint is resumed.
TRAININGS = {"text_to_image": (text_to_image, ""), "autoencoder": (autoencoder, "local_refinement")}


def run(name: str, folder: Path) -> dict:
    """Trains to the end in `folder`, the current one; the records read, and the state in figures.

    A leaf's figures are its norm, and its product with numbers that are all different.
    """
    read, get = [], Folder.__getitem__

    def spy(self, index: int):
        path = f"{self.root}/{self._images[index]}"
        if "/train/" in path and threading.current_thread().name.startswith("decode"):
            read.append(path.rpartition("/train/")[2])
        return get(self, index)

    make, phase = TRAININGS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "__getitem__", spy)
        patch.setattr(jax, "devices", lambda: jax.local_devices()[:1])  # eight compile for longer
        patch.chdir(folder)
        make(folder / name).run()
    leaves = {}
    for part in "params", "ema", "opt_state":
        document, tree = read_newest(folder / name / phase, part)
        flat = traverse_util.flatten_dict(tree, sep="/")
        for path in (path for path in flat if NOISE not in path):
            values = np.asarray(flat[path], np.float64).ravel()
            figures = np.linalg.norm(values), values @ np.cos(np.arange(values.size))
            leaves[f"{part}/{path}"] = [float(f"{figure:.9g}") for figure in figures]
    assert document["step"] == STEPS
    # The loader reads a batch or two ahead.
    return {"records": read[: (STEPS - STOPPED) * BATCH], "leaves": leaves}


def test_every_config_has_the_keys_and_values_of_before():
    for name, then in expected("configs.json").items():
        now = config_keys(ROOT / "configs" / name)
        assert {key: now.get(key, "absent") for key in then} == then, name


def test_every_flag_of_before_is_taken_and_has_its_default():
    then, now = expected("flags.json"), command_flags()
    assert then.keys() == COMMANDS.keys()
    for command, flags in then.items():
        for name, flag in flags.items():
            assert name in now[command], f"{command}: --{name} is gone"
            found = now[command][name]
            choices = flag["choices"] and [c for c in found["choices"] if c in flag["choices"]]
            assert found | {"choices": choices} == flag, f"{command}: --{name}"


def test_records_of_shapes_are_those_of_before():
    assert shapes_records() == expected("shapes.json")


def test_a_folder_of_pictures_that_was_begun_before_is_finished(tmp_path):
    """Keys of all that decides a picture are as they were, and so are the pictures.

    A float of the decoder just beside n + 1/2 may be rounded to either: one grey level.
    """
    begun, kept = tmp_path / "drawn", "000000_0.png"
    shutil.copytree(GOLDEN / "drawn", begun)
    pictures = {path.name for path in begun.glob("*.png")}
    assert len(pictures) == len(PROMPTS)
    for name in pictures - {kept}:
        (begun / name).unlink()
    result = sample(begun)
    assert result.returncode == 0, result.stderr
    assert "3 images in" in result.stderr  # not the one that was there
    now, then = ((at / "manifest.jsonl").read_text() for at in (begun, GOLDEN / "drawn"))
    assert re.sub('"sha256": "[^"]*"', "", now) == re.sub('"sha256": "[^"]*"', "", then)
    for name in pictures:
        ours, theirs = (np.asarray(Image.open(at / name), int) for at in (begun, GOLDEN / "drawn"))
        assert ours.shape == theirs.shape and abs(ours - theirs).max() <= 1, name


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    with tarfile.open(GOLDEN / "runs.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_a_native_folder_is_read_and_written_as_before(artefacts, tmp_path):
    base, again = artefacts / "base", tmp_path / "again"
    checkpoint = native.open_folder(base)
    for name, params in checkpoint.params.items():
        flat = traverse_util.flatten_dict(params, sep="/")
        stored = load_file(base / f"{name}.safetensors")
        assert flat.keys() == stored.keys()
        assert all(np.array_equal(flat[path], stored[path]) for path in stored)
    again.mkdir()
    native.save(checkpoint, again)
    files = sorted(path.relative_to(base) for path in base.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    # The tokenizer's own files are of the version of transformers that writes them.
    for file in (file for file in files if "tokenizer" not in file.parts):
        ours, theirs = ((at / file).read_text("latin-1") for at in (again, base))
        if file.name == "model.json":
            ours, theirs = (re.sub(r'"tokenizer/.*', "", text) for text in (ours, theirs))
        assert ours == theirs, file


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_that_was_stopped_before_ends_as_it_did(artefacts, name):
    """Records in their order to the last one, parameters, averages and the optimizer's state."""
    then, now = expected(f"{name}.json"), run(name, artefacts)
    assert now["records"] == then["records"]
    assert now["leaves"].keys() == then["leaves"].keys()
    for path, figures in then["leaves"].items():
        difference = np.abs(np.subtract(now["leaves"][path], figures)).max()
        assert difference <= TOLERANCES[path.partition("/")[0]] * figures[0], path
