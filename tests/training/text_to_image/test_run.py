"""A whole tiny training: what it writes, how it resumes, what it refuses."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from sana_jax.checkpoints import native
from sana_jax.pipeline.pipeline import SanaPipeline
from sana_jax.runtime.errors import Retry, UserError
from sana_jax.training.checkpoints.manager import read_newest
from sana_jax.training.state import TrainState
from sana_jax.training.text_to_image import networks
from sana_jax.training.text_to_image.networks import open_base
from sana_jax.training.text_to_image.result import open_workdir
from sana_jax.training.text_to_image.run import TextToImageTraining
from tests import xla
from tests.training.text_to_image.toy import load, store, stored

ROOT = Path(__file__).parents[3]


def document(workdir):
    """Returns the newest checkpoint's document: its leaves' checksums, the data's position."""
    return read_newest(workdir, "params")[0]


def assert_same_end(workdir, unbroken):
    """Compares every leaf, and the position of the data, to the bit."""
    ours, theirs = document(workdir), document(unbroken)
    assert ours["step"] == theirs["step"] == 20
    assert ours["leaves"] == theirs["leaves"]
    assert ours["iterators"] == theirs["iterators"]
    for part in ("params/dit/", "opt_state/", "ema/dit/", "key"):
        assert any(name.startswith(part) for name in ours["leaves"]), part


def command(config, workdir, *arguments):
    cache = config.parent / "cache"
    module = [sys.executable, "-m", "sana_jax.train", f"--compilation_cache={cache}"]
    return [*module, f"--config={config}", f"--workdir={workdir}", *arguments]


def test_it_shows_what_it_does(unbroken):
    rows = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == [5, 10, 15, 20]
    for row in trained:
        assert {"learning_rate", "gradient_norm", "images_per_second", "data_wait"} <= row.keys()
        assert 0 < row["mfu"] < 1 and row["skipped"] == 0
    assert "compile_seconds" in trained[0]
    assert "checkpoint_seconds" in trained[1]
    (held_out,) = (row for row in rows if "held_out_loss" in row)
    assert held_out["held_out_loss"] == pytest.approx(
        (held_out["held_out_loss_0.2"] + held_out["held_out_loss_0.8"]) / 2
    )
    sheet = np.asarray(Image.open(unbroken / "images/samples_00000020.png"))
    assert sheet.shape == (16, 34, 3)  # two pictures, a gap between


def test_the_model_at_the_end_is_the_average(unbroken, config):
    _, ema = read_newest(unbroken, "ema")
    stored = load_file(unbroken / "model/dit.safetensors")
    np.testing.assert_array_equal(stored["proj_out/kernel"], ema["dit"]["proj_out"]["kernel"])
    model = native.open_folder(unbroken / "model")
    assert model.provenance["trained"] is True and model.provenance["steps"] == 20
    parts = native.open_folder(config.parent / "base")
    for part in ("autoencoder", "text_encoder"):
        assert model.provenance[part] == parts.provenance
    start = str(unbroken / "model")
    changes = dict(autoencoder=start, start=start, text_encoder__checkpoint=start)
    further, _ = open_base(load(config, **changes))
    assert further.provenance["autoencoder"] == parts.provenance
    assert further.provenance["start"] == "model"
    encoder = further.provenance["text_encoder"]  # without the autoencoder's history once more
    assert encoder["steps"] == 20 and encoder["text_encoder"] == parts.provenance
    assert "autoencoder" not in encoder
    assert (model.text_rows, model.flow_shift) == (8, 3.0)
    pipe = SanaPipeline.from_pretrained(str(unbroken / "model"), dtype="float32")
    (drawn,) = pipe("a red cat", num_steps=1, output="np")
    sheet = np.asarray(Image.open(unbroken / "images/samples_00000020.png"))
    assert np.abs(sheet[:, :16].astype(int) - drawn.astype(int)).max() <= 1


def test_images_are_encoded_in_float32(config, tmp_path):
    """Equal to the bit, whatever dtype the transformer computes in."""
    latents = []
    for dtype in "float32", "bfloat16":
        run = TextToImageTraining(load(config, dtype=dtype), str(tmp_path))
        with jax.set_mesh(run.mesh):
            latents.append(jax.jit(run.task._latents)(run.loader.batch(0), run._frozen))
    np.testing.assert_array_equal(*latents)


def test_killed_and_terminated_it_ends_as_the_unbroken_run(unbroken, config, tmp_path, monkeypatch):
    """Bit-exact on the same devices: SIGKILL in another process, SIGTERM in this one."""
    workdir = tmp_path / "run"
    run = subprocess.Popen(command(config, workdir), cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (workdir / "checkpoints/5").exists():
        assert run.poll() is None
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    training = TextToImageTraining(load(config), str(workdir))
    batch = type(iter(training.loader)).__next__

    def terminated(iterator):
        if iterator.step == 14:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(iterator)

    with monkeypatch.context() as patch:
        patch.setattr(type(iter(training.loader)), "__next__", terminated)
        with pytest.raises(Retry, match="SIGTERM after step 1[0-9] of 20: saved"):
            training.run()
    assert document(workdir)["step"] < 20
    TextToImageTraining(load(config), str(workdir)).run()
    assert_same_end(workdir, unbroken)


@pytest.mark.parametrize("devices", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_it_goes_on_with_fewer_devices(unbroken, config, tmp_path, devices, monkeypatch):
    """8 -> 4 and 8 -> 1: sums have another order, so equal to float32's rounding in five steps."""
    workdir = tmp_path / "run"
    shutil.copytree(unbroken, workdir)
    for name in ("20", "10", "5"):
        shutil.rmtree(workdir / "checkpoints" / name, ignore_errors=True)
    all_devices = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda *a: all_devices[:devices])
    axes = dict(mesh__replica=1, mesh__fsdp=devices)
    TextToImageTraining(load(config, **axes), str(workdir)).run()
    ours, theirs = (read_newest(folder, "params")[1]["dit"] for folder in (workdir, unbroken))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4)


def test_it_goes_on_where_its_data_moved_but_not_with_other_data(unbroken, config, tmp_path):
    run, photos = tmp_path / "run", tmp_path / "photos"
    shutil.copytree(unbroken, run)
    shutil.copytree(config.parent / "photos" / "train", photos)
    moved = load(config, data__source=str(photos), loop__evaluate_every=0)
    TextToImageTraining(moved, str(run)).run()
    (photos / "0.txt").write_text("a red dog")
    with pytest.raises(UserError, match="is of another run: data.source: [0-9a-f]+ -> [0-9a-f]+;"):
        TextToImageTraining(moved, str(run)).run()


def test_another_run_is_refused_with_the_difference(unbroken, config):
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}
    for changes, message in (
        (dict(seed=1), "config.seed: 0 -> 1"),
        (dict(recipe__batch_size=16), "config.recipe.batch_size: 8 -> 16"),
        (dict(recipe__noise__shift=4.0), "config.recipe.noise.shift: 3.0 -> 4.0"),
        (dict(data__train_split="test"), "data.source: "),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            TextToImageTraining(load(config, **changes), str(unbroken)).run()
    after = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file()}
    assert after == {path: time for path, time in before.items() if path.is_file()}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(recipe__batch_size=12), "config.recipe.batch_size=12: it is a multiple of 8"),
        (dict(recipe__microbatches=2), "config.recipe.batch_size=8: it is a multiple of 16"),
        (dict(recipe__steps=0), "config.recipe.steps=0"),
        (
            dict(recipe__optimizer__learning_rate=-1.0),
            "config.recipe.optimizer.learning_rate=-1.0: give",
        ),
        (
            dict(recipe__optimizer__warmup_steps=21),
            "config.recipe.optimizer.warmup_steps=21: give 0 to",
        ),
        (dict(recipe__optimizer__name="sgd"), "config.recipe.optimizer.name 'sgd' is unknown"),
        (dict(recipe__noise__density="normal"), "config.recipe.noise.density 'normal' is"),
        (dict(recipe__caption_dropout=1.5), "config.recipe.caption_dropout=1.5"),
        (dict(auto_lr="linear"), "config.auto_lr='linear': give none or sqrt"),
        (dict(remat="some"), "config.remat='some': give none, full, dots, offload"),
        (dict(unroll=0), "config.unroll=0: give 1 or more"),
        (dict(network__implementation="cuda"), "config.network.implementation='cuda': give auto"),
        (dict(seed=-1), "config.seed=-1: it is at least 0"),
        (dict(seed=2**32), "config.seed=4294967296: it is at most"),
        (dict(keep=0), "config.keep=0: it is at least 1"),
        (dict(keep_every=0), "config.keep_every=0: it is at least 1"),
        (dict(loader__threads=-1), "config.loader.threads=-1: it is at least 0"),
        (dict(loader__prefetch=-1), "config.loader.prefetch=-1: it is at least 0"),
        (dict(loop__watchdog_seconds=-1.0), "config.loop.watchdog_seconds=-1.0: it is at least 0"),
        (dict(loop__max_streak=-1), "config.loop.max_streak=-1: it is at least 0"),
        (dict(dtype="float99"), "config.dtype='float99'"),
        (dict(autoencoder=None), "config.autoencoder is missing"),
        (dict(autoencoder="nowhere"), "no checkpoint 'nowhere'"),
        (dict(autoencoder="shapes"), "latent channels"),
        (dict(text_encoder__checkpoint="autoencoder"), "this checkpoint has no text_encoder"),
        (dict(text_encoder__checkpoint=None), "config.text_encoder.checkpoint is missing"),
        (
            dict(text_encoder__train=True, text_encoder__instruction=False),
            "config.text_encoder.network.vocab_size=256000, config.text_encoder.network.hidden",
        ),
        (dict(start="autoencoder"), "config.start=autoencoder: this checkpoint has no transformer"),
        (dict(network__caption_channels=40), "the transformer reads text of width 40"),
        (dict(network__width=33), "config.network: transformer width 33"),
        (dict(mesh__replica=3, mesh__fsdp=1), "does not fit 8 devices"),
        (dict(data__size=18), "config.data.size=18: it is a multiple of 4"),
        (dict(loop__images_every=1, images__prompts=()), "config.images.prompts is empty"),
        (dict(loop__evaluate_every=1, evaluation__batches=0), "config.evaluation.batches 0 is not"),
        (dict(loop__evaluate_every=1, evaluation__sigmas=()), "config.evaluation.sigmas=(): give"),
        (dict(loop__evaluate_every=1, evaluation__batch_size=4), "config.evaluation.batch_size=4"),
        (dict(loop__images_every=1, images__num_steps=0), "config.images.num_steps 0 is not"),
        (
            dict(loop__images_every=1, images__guidance_scale=float("nan")),
            "config.images.guidance_scale=nan: give a finite number",
        ),
        (dict(text_encoder__rows=0), "config.text_encoder.rows 0 is not"),
        (dict(text_encoder__tokenizer="here"), "config.text_encoder.tokenizer is for a new text"),
        (dict(data__size=-32), "config.data.size=-32: it is a multiple of 4"),
        (
            dict(recipe__microbatches=-1, recipe__encoder_microbatches=-1),
            "config.recipe.microbatches=-1: give",
        ),
        (dict(data__shapes__seed=-1), "config.data.shapes.seed=-1: it is at least 0"),
        (dict(phases=()), "it is for sana_jax.train_dc_ae"),
        (dict(recipe__steps=10**400), "config.recipe.steps=1000"),
        (dict(recipe__optimizer__learning_rate=float("inf")), "config.recipe.optimizer.learning_r"),
        (dict(loader__threads=10**9), "config.loader.threads=1000000000: give a number up to"),
        (dict(data__size=2**20), "config.data.size=1048576: give a number up to"),
    ],
    ids=str,
)
def test_bad_config_is_refused_before_anything_is_written(
    config, tmp_path, changes, message, monkeypatch
):
    monkeypatch.chdir(config.parent)
    with pytest.raises(UserError, match=re.escape(message)):
        TextToImageTraining(load(config, **changes), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_new_text_encoder_trains_beside_the_transformer(config, tmp_path):
    changes = dict(
        text_encoder__checkpoint=None,
        text_encoder__train=True,
        text_encoder__tokenizer=str(config.parent / "base/tokenizer"),
        recipe__steps=2,
    )
    sizes = dict(vocab_size=640, hidden_size=48, intermediate_size=32, num_layers=1, num_heads=2)
    sizes |= dict(num_kv_heads=1, head_dim=8, query_pre_attn_scalar=8)
    changes |= {f"text_encoder__network__{name}": value for name, value in sizes.items()}
    TextToImageTraining(load(config, **changes), str(tmp_path)).run()
    start, end = (read_newest(tmp_path, part)[1]["text_encoder"] for part in ("ema", "params"))
    assert any(
        not np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(start), jax.tree.leaves(end), strict=True)
    )
    model = native.open_folder(tmp_path / "model")
    assert model.text_encoder.num_layers == 1 and model.instruction is None


@pytest.mark.slow  # compiles a step and an evaluation for each of two shapes, twice
def test_buckets_from_another_model(config, tmp_path, monkeypatch):
    """Stored latents of two shapes, both evaluated; only step 0 needs `start`."""
    for split in "train", "test":
        store(tmp_path, config, split, [(4, 4), (2, 8)])
    device = jax.devices()[:1]  # it compiles two steps, twice
    monkeypatch.setattr(jax, "devices", lambda *a: device)
    start = shutil.copytree(config.parent / "base", tmp_path / "start")
    changes = dict(start=str(start), data__buckets=True, recipe__steps=4)
    changes |= dict(loop__log_every=1, loop__checkpoint_every=2, loop__evaluate_every=2)
    changes |= dict(evaluation__batches=2)
    training = stored(tmp_path, config, **changes)
    first = training._start(lambda: TrainState(*[{}] * 7))
    weights = load_file(start / "dit.safetensors")
    np.testing.assert_array_equal(
        first.params["dit"]["proj_out"]["kernel"], weights["proj_out/kernel"]
    )
    training.run()
    shapes = {training.loader.batch(step)["latents"].shape[1:3] for step in range(4)}
    assert shapes == {(4, 4), (2, 8)}
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sum("held_out_loss" in row for row in rows) == 2
    assert "compile_seconds" in rows[0]
    shutil.rmtree(start)
    assert open_workdir(tmp_path / "run").provenance["steps"] == 4
    stored(tmp_path, config, **changes | dict(recipe__steps=5)).run()
    assert document(tmp_path / "run")["step"] == 5
    with pytest.raises(UserError, match=r"config\.start: "):
        stored(tmp_path, config, **changes | dict(start=None, recipe__steps=5)).run()


def test_a_good_model_stays_until_the_next_is_whole(config, tmp_path, monkeypatch):
    training = TextToImageTraining(load(config), str(tmp_path))
    dit = networks.open_start(load(config, start=str(config.parent / "base")))

    def export(step, first):
        training._export(TrainState(step, *[None] * 2, {"dit": dit}, *[None] * 3), first)

    export(20, 0)
    assert native.open_folder(tmp_path / "model").provenance["steps"] == 20
    kept = {path: path.read_bytes() for path in (tmp_path / "model").glob("*.*")}

    def full(checkpoint, folder):
        (folder / "dit.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native, "save", full)
    export(20, 20)  # nothing was left to do
    with pytest.raises(Retry, match="model: No space left on device"):
        export(21, 20)
    assert kept == {path: path.read_bytes() for path in kept}
    monkeypatch.undo()
    export(21, 20)
    assert native.open_folder(tmp_path / "model").provenance["steps"] == 21
    assert not (tmp_path / "model.part").exists()


@pytest.mark.parametrize("damage", ["half", "empty", "no weights", "half model.json", "gone"])
def test_a_damaged_model_is_written_again_by_the_same_command(unbroken, config, tmp_path, damage):
    run = shutil.copytree(unbroken, tmp_path / "run")
    model, file = run / "model", run / "model" / "dit.safetensors"
    if damage == "gone":
        shutil.rmtree(model)
    elif damage == "no weights":
        file.unlink()
    else:
        file = model / "model.json" if "json" in damage else file
        file.write_bytes(b"" if damage == "empty" else file.read_bytes()[:-10])
    TextToImageTraining(load(config), str(run)).run()
    names = [path.relative_to(model) for path in model.rglob("*") if path.is_file()]
    assert len(names) == len([p for p in (unbroken / "model").rglob("*") if p.is_file()])
    for name in names:
        assert (model / name).read_bytes() == (unbroken / "model" / name).read_bytes(), name


HOST = """
import sys, jax
index, port, config, workdir = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(index))
from pathlib import Path
from sana_jax.training.text_to_image.result import open_workdir
from sana_jax.training.text_to_image.run import TextToImageTraining
from tests.training.text_to_image.toy import load
changes = dict(recipe__steps=4, loop__images_every=4, loop__evaluate_every=4)
changes |= dict(mesh__fsdp=2, mesh__tensor=2)
TextToImageTraining(load(Path(config), **changes), workdir).run()
"""


@pytest.mark.slow  # a minute
def test_two_hosts_train_as_one(config, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] = xla.flags(devices=2)
    runs = []
    for host in "01":
        arguments = [sys.executable, "-c", HOST, host, str(port), config, tmp_path / "two"]
        pipe = subprocess.PIPE
        runs.append(subprocess.Popen(arguments, stdout=pipe, stderr=pipe, env=environment))
    results = [run.communicate(timeout=600) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], results
    TextToImageTraining(load(config, recipe__steps=4), str(tmp_path / "one")).run()
    ours, theirs = (read_newest(tmp_path / name, "params")[1]["dit"] for name in ("two", "one"))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
    assert (tmp_path / "two/images/samples_00000004.png").exists()
    assert len(document(tmp_path / "two")["iterators"]) == 2
    native.open_folder(tmp_path / "two/model")


@pytest.mark.slow
def test_a_training_in_int8_learns_and_its_products_are_those_of_the_stored_weights(
    config, tmp_path
):
    products = dict(recipe__int8=("forward", "rows", "weights"), recipe__steps=10)
    training = TextToImageTraining(load(config, **products), str(tmp_path / "run"))
    training.run()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    params = {"dit": native.open_folder(tmp_path / "run/model").params["dit"]}
    params = jax.tree.map(np.asarray, training.task.network("dit", params, training._frozen))
    kernel = params["blocks"]["ffn"]["expand"]["kernel"]
    assert kernel.products == {"forward", "rows", "weights"} and kernel.kernel.dtype == "float32"
    with pytest.raises(UserError, match="config.recipe.*int8: 'backward' is not one of forward"):
        TextToImageTraining(load(config, recipe__int8=("backward",)), "unused")
