"""A tiny autoencoder's whole training, as a command: phases, kills, resumes, other configs."""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from sana_jax.checkpoints import native
from sana_jax.checkpoints.find import checkpoint_hash
from sana_jax.pictures import to_float
from sana_jax.runtime.errors import Retry, UserError
from sana_jax.runtime.files import read_json
from sana_jax.training.autoencoder import run as autoencoder_run
from sana_jax.training.autoencoder.run import (
    AutoencoderTraining,
    _copy_model,
    _fixed,
    _training_seconds,
)
from tests import xla
from tests.training.autoencoder.toy import PHASES, load

ROOT = Path(__file__).parents[3]


def command(config, workdir, *arguments):
    cache = config.parent / "cache"
    module = [sys.executable, "-m", "sana_jax.train_dc_ae", f"--compilation_cache={cache}"]
    return [*module, f"--config={config}", f"--workdir={workdir}", *arguments]


# One device, where the tests' own process has eight.
ENVIRONMENT = os.environ | {"XLA_FLAGS": xla.flags(devices=1)}


def run(config, workdir, *arguments, **environment):
    return subprocess.run(
        command(config, workdir, *arguments),
        cwd=ROOT,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    result = run(config, workdir)
    assert result.returncode == 0, result.stderr
    return workdir


def last_document(workdir, phase):
    """Returns the last checkpoint's document: checksums of its leaves, the data's position."""
    checkpoints = workdir / phase / "checkpoints"
    step = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())
    return json.loads((checkpoints / str(step) / "run" / "metadata").read_text())


def weights(folder):
    return load_file(folder / "vae.safetensors")


def test_each_phase_trains_what_it_says(unbroken):
    steps = [weights(unbroken / phase / "model") for phase in PHASES]
    changed = [
        {name for name in new if old[name].tobytes() != new[name].tobytes()}
        for old, new in itertools.pairwise(steps)
    ]
    middle = {"encoder/conv_out/kernel", "encoder/conv_out/bias"}
    middle |= {"decoder/conv_in/kernel", "decoder/conv_in/bias"}
    assert changed[0] == middle & steps[0].keys()
    assert changed[1] == {"decoder/conv_out/kernel", "decoder/conv_out/bias"}


def test_results_are_there_and_add_up(unbroken):
    for phase in PHASES:
        results = json.loads((unbroken / phase / "results.json").read_text())
        assert results["images"] == 40 and results["skipped_updates"] == 0
        for when, size in itertools.product(("before", "after"), ("32", "48")):
            assert results[when][size]["count"] == 6
            assert np.isfinite(results[when][size]["psnr"])
        assert list((unbroken / phase / "images").glob("*_00000010.png"))
    first = json.loads((unbroken / PHASES[0] / "results.json").read_text())
    assert first["after"]["32"]["psnr"] > first["before"]["32"]["psnr"] + 0.5
    # A phase starts where the phase before it ended.
    second = json.loads((unbroken / PHASES[1] / "results.json").read_text())
    np.testing.assert_allclose(
        second["before"]["48"]["psnr"], first["after"]["48"]["psnr"], rtol=1e-5
    )


def test_training_seconds_are_those_of_all_steps(tmp_path):
    """Saved and resumed at step 6: row 8 measures two steps, and its rate counts for four."""
    rows = [(2, 4.0), (4, 8.0), (8, 16.0)]
    lines = [json.dumps({"step": step, "images_per_second": rate}) for step, rate in rows]
    lines.insert(2, json.dumps({"step": 4, "validation_loss": 0.5}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    seconds = _training_seconds(tmp_path, SimpleNamespace(batch_size=10))
    assert seconds == 2 * 10 / 4 + 2 * 10 / 8 + 4 * 10 / 16


def test_the_model_is_an_autoencoder_that_says_where_it_is_from(unbroken):
    model = native.open_folder(unbroken / "model")
    assert model.provenance["trained"] is True
    assert [phase["phase"] for phase in model.provenance["phases"]] == list(PHASES)
    assert weights(unbroken / "model").keys() == weights(unbroken / PHASES[2] / "model").keys()


def test_scaling_factor_makes_latents_of_unit_size(unbroken, config):
    """Measured after phase 2, whose encoder phase 3 keeps."""
    from sana_jax.checkpoints.components import module_for, place
    from sana_jax.data.loader import TrainingLoader
    from sana_jax.data.sources import open_source
    from sana_jax.data.transforms import ImageTransform
    from sana_jax.sharding import make_mesh

    factors = {}
    for phase in PHASES:
        model = native.open_folder(unbroken / phase / "model")
        factors[phase] = model.vae.scaling_factor
    assert factors[PHASES[0]] != factors[PHASES[1]] == factors[PHASES[2]]
    source = open_source(str(config.parent), "train")
    loader = TrainingLoader(
        source, ImageTransform(48, 48, crop="random", flip=True), batch_size=4, seed=1
    )
    params = place(model.params["vae"], model.vae, "float32", make_mesh(devices=jax.devices()[:1]))
    images = np.concatenate([loader.batch(step)["image"] for step in range(2)])
    encode = jax.jit(partial(module_for(model.vae, "float32").apply, method="encode"))
    latents = encode({"params": params}, to_float(images))
    size = np.sqrt(np.mean(np.square(latents))) * model.vae.scaling_factor
    np.testing.assert_allclose(size, 1, rtol=1e-3)


def test_killed_at_any_moment_it_ends_as_the_unbroken_run(unbroken, config, tmp_path):
    """SIGKILL in two phases, at arbitrary moments: every leaf ends with the same bits."""
    workdir = tmp_path / "run"
    for phase, rows in ((PHASES[0], 2), (PHASES[2], 3)):
        process = subprocess.Popen(
            command(config, workdir),
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        metrics = workdir / phase / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < rows:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (workdir / "model").exists()
    result = run(config, workdir)
    assert result.returncode == 0, result.stderr
    for phase in PHASES:
        ours, theirs = last_document(workdir, phase), last_document(unbroken, phase)
        assert ours["leaves"].keys() == theirs["leaves"].keys()
        assert ours["leaves"] == theirs["leaves"], phase
        assert ours["iterators"] == theirs["iterators"], phase
    leaves = last_document(workdir, PHASES[2])["leaves"]
    for part in ("params/autoencoder", "params/discriminator", "opt_state", "ema", "key"):
        assert any(name.startswith(part) for name in leaves), part
    ours, theirs = weights(workdir / "model"), weights(unbroken / "model")
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)


def test_a_second_run_does_nothing(unbroken, config):
    before = {path: path.stat().st_ctime_ns for path in unbroken.rglob("*.*")}
    assert unbroken / "model" / "model.json" in before
    free = "--config.loop.log_every=1", "--config.evaluation.batch_size=2"
    result = run(config, unbroken, *free)
    assert result.returncode == 0, result.stderr
    assert {path: path.stat().st_ctime_ns for path in unbroken.rglob("*.*")} == before


def test_phases_that_are_over_are_of_this_config(unbroken, config):
    result = run(config, unbroken, "--config.seed=1", "--config.evaluation.images=5")
    assert result.returncode == 2, result.stderr
    assert "low_resolution was trained by another config" in result.stderr
    assert "evaluation, seed changed" in result.stderr


def test_a_model_left_half_copied_or_of_another_run_is_replaced(unbroken, tmp_path):
    (tmp_path / "model.part").mkdir()
    (tmp_path / "model.part" / "half").touch()
    for phase in PHASES:
        _copy_model(unbroken / phase / "model", tmp_path / "model")
        assert checkpoint_hash(tmp_path / "model") == checkpoint_hash(unbroken / phase / "model")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_damaged_models_and_figures_are_made_again_by_the_same_command(unbroken, config, tmp_path):
    workdir = shutil.copytree(unbroken, tmp_path / "run")
    (workdir / "model" / "model.json").write_bytes(b"\0" * 100)
    (workdir / PHASES[0] / "model" / "vae.safetensors").write_bytes(b"half")
    shutil.rmtree(workdir / PHASES[1] / "model")
    for name in "before.json", "results.json":
        (workdir / PHASES[2] / name).write_bytes(b"")
    result = run(config, workdir)
    assert result.returncode == 0, result.stderr
    for model in ("model", *(f"{phase}/model" for phase in PHASES)):
        assert native.is_whole(workdir / model)
        for name, weight in weights(unbroken / model).items():
            assert weight.tobytes() == weights(workdir / model)[name].tobytes(), (model, name)
    for phase in PHASES[:2]:  # the last phase's model tells the time of its training
        assert checkpoint_hash(workdir / phase / "model") == checkpoint_hash(
            unbroken / phase / "model"
        )
    ours, theirs = (read_json(x / PHASES[2] / "results.json") for x in (workdir, unbroken))
    assert ours["before"] == theirs["before"] and ours["after"] == theirs["after"]

    shutil.rmtree(workdir / PHASES[0] / "model")
    shutil.rmtree(workdir / PHASES[0] / "checkpoints" / "10")
    result = run(config, workdir)
    assert result.returncode == 2, result.stderr
    assert "so is the checkpoint of step 10: bring one back, or remove" in result.stderr


STARTED = ("--config.run=('low_resolution',)", "--config.phases.low_resolution.steps=2")


def test_a_training_starts_from_a_checkpoint(unbroken, config, tmp_path):
    """It tells its progress before each silence, as does one that goes on."""
    started = *STARTED, f"--config.start={unbroken / 'model'}"
    result = run(config, tmp_path / "run", *started)
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith(PHASES[0])]
    assert said == [
        f"{PHASES[0]}: {what}"
        for what in (
            "measuring the held-out images",
            "compiling the step",
            "measuring the latents and the held-out images",
        )
    ]
    folder = tmp_path / "run" / PHASES[0]
    (folder / "results.json").unlink()
    result = run(config, tmp_path / "run", *started)
    assert result.returncode == 0 and f"{PHASES[0]}: resumed at step 2 of 2" in result.stderr
    after = read_json(unbroken / PHASES[2] / "results.json")["after"]
    before = read_json(folder / "before.json")
    for size in ("32", "48"):
        for name in ("psnr", "ssim", "high_frequency_ratio"):
            np.testing.assert_allclose(before[size][name], after[size][name], rtol=1e-6)
    lineage = native.open_folder(tmp_path / "run" / "model").provenance["phases"]
    assert [phase["phase"] for phase in lineage] == [*PHASES, PHASES[0]]
    # The same command has nothing left to do; other starting weights make it another training.
    again = run(config, tmp_path / "run", *started)
    assert again.returncode == 0 and "phase low_resolution is over" in again.stderr
    other = run(config, tmp_path / "run", *STARTED, f"--config.start={unbroken / PHASES[0]}/model")
    assert other.returncode == 2 and "from another model" in other.stderr


def test_the_history_of_a_whole_model_goes_on(unbroken, config, tmp_path):
    training = AutoencoderTraining(load(config), str(tmp_path))
    params = native.open_folder(unbroken / "model").params["vae"]
    whole = SimpleNamespace(provenance={"autoencoder": {"phases": [{"phase": "earlier"}]}})
    training._export(tmp_path, params, {"phase": "now", "scaling_factor": 1.0}, whole)
    lineage = native.open_folder(tmp_path / "model").provenance["phases"]
    assert [phase["phase"] for phase in lineage] == ["earlier", "now"]


HOST = """
import json, sys
import jax
from sana_jax import train_dc_ae
from sana_jax.runtime import cli
from sana_jax.training.autoencoder import run

host, port = int(sys.argv.pop(1)), sys.argv.pop(1)
jax.distributed.initialize(f"localhost:{port}", 2, host)
write = run._write

def show(path, contents):  # on every host, though only one writes
    print("found", path.name, json.dumps(contents))
    write(path, contents)

run._write = show
cli.run(train_dc_ae.main, resumes=True)
"""


@pytest.mark.slow  # a minute
def test_two_hosts_train_as_one_does(config, tmp_path):
    """Two processes with a device each, and one with two: the same batches, losses, figures."""
    phases = [f"--config.phases.{phase}.steps=3" for phase in PHASES]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    workdir, alone, cache = tmp_path / "two", tmp_path / "one", config.parent / "cache"
    arguments = [f"--config={config}", f"--compilation_cache={cache}", *phases]
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(host), port, *arguments, f"--workdir={workdir}"],
            env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in (0, 1)
    ]
    outputs = [host.communicate(timeout=300) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    first, second = (re.findall("^found .*", output, re.M) for output, _ in outputs)
    assert first == second and len(first) == 2 * len(PHASES)
    assert not outputs[1][1].strip(), "the second host is silent"

    two_devices = {"XLA_FLAGS": xla.flags(devices=2)}
    single = run(config, alone, *phases, **two_devices)
    assert single.returncode == 0, single.stderr
    for phase in PHASES:
        ours, theirs = (read_json(w / phase / "results.json") for w in (workdir, alone))
        assert ours["after"].keys() == theirs["after"].keys()
        for when, size in itertools.product(("before", "after"), ("32", "48")):
            for name in ("count", "psnr", "ssim"):
                values = ours[when][size][name], theirs[when][size][name]
                np.testing.assert_allclose(*values, rtol=1e-4)
        np.testing.assert_allclose(ours["scaling_factor"], theirs["scaling_factor"], rtol=1e-4)
        rows = [(w / phase / "metrics.jsonl").read_text().splitlines() for w in (workdir, alone)]
        for our, their in zip(*[map(json.loads, part) for part in rows], strict=True):
            assert our["step"] == their["step"]
            np.testing.assert_allclose(our["loss"], their["loss"], rtol=1e-4)
    ours, theirs = weights(workdir / "model"), weights(alone / "model")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        # Adam makes a step of the learning rate, 3e-3, of the smallest gradient's sign.
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-3, err_msg=name)


def test_a_full_disk_is_worth_a_retry(config, tmp_path, monkeypatch):
    training = AutoencoderTraining(load(config), str(tmp_path / "run"))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native, "save", full)
    with pytest.raises(Retry, match="No space left"):
        training._export(tmp_path, {}, {"scaling_factor": 1.0}, None)
    monkeypatch.setattr(autoencoder_run, "write_atomically", full)
    with pytest.raises(Retry, match="results.json: No space left"):
        autoencoder_run._write(tmp_path / "results.json", {})


def test_weights_of_the_loss_are_told_by_their_content(config, tmp_path, monkeypatch):
    """The file may move; without a file, there is no fingerprint."""
    make = autoencoder_run.make_perceptual
    monkeypatch.setattr(
        autoencoder_run, "make_perceptual", lambda name, weights, dtype: make(name, None, dtype)
    )
    monkeypatch.setattr(
        autoencoder_run, "AutoencoderTask", lambda *args: SimpleNamespace(phase=args[2])
    )

    def about(name, content=None):
        changed = load(config)
        if name:
            (tmp_path / name).write_bytes(content)
            changed.perceptual.weights = str(tmp_path / name)
        training = AutoencoderTraining(changed, str(tmp_path / "run"))
        return training, training._about(0, training.tasks[PHASES[0]].phase, None)

    (_, first), (_, moved), (_, other) = about("a", b"1"), about("b", b"1"), about("a", b"2")
    assert first != moved and _fixed(first) == _fixed(moved) != _fixed(other)
    training, without = about(None)
    assert "perceptual_weights" not in without
    # A phase that was over before the name of the file was free.
    (tmp_path / "run" / PHASES[0]).mkdir(parents=True)
    (tmp_path / "run" / PHASES[0] / "results.json").write_text(json.dumps({"about": without}))
    with pytest.raises(UserError, match=f"{PHASES[0]}/model"):  # it is taken to be over
        training.run()


def test_a_phase_that_is_over_is_of_the_data_wherever_it_is(config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        autoencoder_run, "AutoencoderTask", lambda *args: SimpleNamespace(phase=args[2])
    )
    shutil.copytree(config.parent, tmp_path / "moved")
    here = load(config)
    moved = load(config, **{"data.source": str(tmp_path / "moved")})
    phase, results = PHASES[0], tmp_path / "run" / PHASES[0] / "results.json"
    results.parent.mkdir(parents=True)

    def end(config):
        training = AutoencoderTraining(config, str(tmp_path / "run"))
        training.run()

    first = AutoencoderTraining(here, str(tmp_path / "run"))
    about = first._about(0, first.tasks[phase].phase, None)
    known = {"about": _fixed(about), "data": first.data.fingerprint(first.tasks[phase].phase)}
    for then, message in (
        (known, f"{phase}/model"),  # it is taken to be over
        (known | {"data": "of others"}, "another model than is there now: data.source changed"),
        ({"about": about}, "data.source changed"),  # of a run that kept only the name
    ):
        results.write_text(json.dumps(then))
        with pytest.raises(UserError, match=message):
            end(moved)


def test_each_batch_that_is_measured_is_a_beat(monkeypatch):
    marks = []

    class Dog:
        def __init__(self, seconds):
            marks.append(seconds)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            marks.append("end")

        def beat(self):
            marks.append("beat")

    def figures(reconstruct, loader, values, on_batch):
        for count in loader:
            on_batch(count)

    monkeypatch.setattr(autoencoder_run, "Watchdog", Dog)
    monkeypatch.setattr(autoencoder_run, "figures", figures)
    training = SimpleNamespace(
        network=SimpleNamespace(latent_channels=4, factor=4),
        config=SimpleNamespace(loop=SimpleNamespace(watchdog_seconds=7)),
        _reconstruct=lambda params, images: images,
    )
    AutoencoderTraining._figures(training, {}, {32: [4, 2], 48: [4]})
    assert marks == [7, "beat", "beat", "end", 7, "beat", "end"]


def test_another_config_in_the_same_folder_is_refused_with_the_difference(
    unbroken, config, tmp_path
):
    workdir = shutil.copytree(unbroken, tmp_path / "run")
    (workdir / "low_resolution" / "results.json").unlink()
    result = run(config, workdir, "--config.phases.low_resolution.perceptual=0.5")
    assert result.returncode == 2, result.stderr
    assert "phase.perceptual: 0.25 -> 0.5" in result.stderr
