"""A session starts or resumes, says so, and trains; an exported model is whole."""

import json
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sana_jax import sharding
from sana_jax.checkpoints import native
from sana_jax.runtime.errors import Retry, UserError
from sana_jax.runtime.files import sha256_of
from sana_jax.text.prompts import tokenize
from sana_jax.training import session as session_module
from sana_jax.training.checkpoints.manager import Checkpoints
from sana_jax.training.loop import LoopConfig
from sana_jax.training.session import Session, export
from tests import PATIENCE, mini
from tests.training import toy_run


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def model(mesh):
    """Returns (abstract state, function that makes the state, step)."""
    return toy_run.model(toy_run.SETTINGS, mesh)


def train(workdir, mesh, model, steps, start=None, loop=None, name="", **options):
    """Runs a session up to `steps`; returns the step it starts from, and the last state."""
    abstract, create, step = model
    loop = LoopConfig(steps, **loop or {})
    with Checkpoints(workdir, {"steps": steps}, {}) as checkpoints:
        batches = toy_run.Batches(toy_run.SETTINGS)
        session = Session(checkpoints, batches, mesh, loop, "config.toy.steps", name)
        state = session.begin(abstract, start or create)
        state = session.fit(state, [step], **options)
    return session.first, state


def test_it_goes_on_where_the_one_before_has_ended(tmp_path, mesh, model, capsys):
    def never():
        raise AssertionError("there is a checkpoint")

    whole, unbroken = train(tmp_path / "whole", mesh, model, 4)
    first, _ = train(tmp_path / "run", mesh, model, 2, name="phase")
    said = capsys.readouterr().err
    assert "compiling the step\n" in said and "phase: compiling the step\n" in said
    assert "resumed" not in said
    then, state = train(tmp_path / "run", mesh, model, 4, start=never, name="phase")
    said = capsys.readouterr().err
    assert said.index("phase: resumed at step 2 of 4\n") < said.index("phase: compiling the step\n")
    assert (whole, first, then) == (0, 0, 2)
    for ours, theirs in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(unbroken.params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    last, _ = train(tmp_path / "run", mesh, model, 4, start=never)
    said = capsys.readouterr().err
    assert last == 4 and "resumed at step 4 of 4\n" in said and "compiling" not in said


def test_more_steps_than_are_wanted_are_refused_by_the_key(tmp_path, mesh, model):
    train(tmp_path, mesh, model, 2)
    rows = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"has 2 steps already, more than config\.toy\.steps=1$"):
        train(tmp_path, mesh, model, 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == rows


@pytest.mark.parametrize(
    "every, at_end, drawn",
    [(0, False, []), (2, False, [2]), (2, True, [2, 3]), (3, True, [3]), (0, True, [3])],
)
def test_images_at_the_end_are_drawn_once(tmp_path, mesh, model, every, at_end, drawn):
    steps = []

    def draw(writer, state, step):
        assert writer.workdir == tmp_path and int(state.step) == step
        steps.append(step)

    loop = {"images_every": every}
    train(tmp_path, mesh, model, 3, loop=loop, on_images=draw, images_at_end=at_end)
    assert steps == drawn


def test_inputs_are_made_when_the_wait_for_them_is_told(tmp_path, mesh, model, capsys):
    abstract, create, step = model

    def inputs():
        assert "compiling the step\n" in capsys.readouterr().err
        return (jax.device_put(np.float32(7), NamedSharding(mesh, P())),)

    def shifted(state, batch, seven):
        state, metrics = step(state, batch)
        return state, metrics | {"shift": seven}

    given = abstract, create, shifted
    train(tmp_path, mesh, given, 1, loop={"log_every": 1}, inputs=inputs)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["shift"] == 7


def test_a_model_is_replaced_when_the_next_is_whole(tmp_path, monkeypatch):
    def save(model, folder):
        (folder / "weights").write_text(model.name)
        files = {"weights": sha256_of(folder / "weights")}
        (folder / "model.json").write_text(json.dumps({"files": files}))

    def named(name):
        return SimpleNamespace(tokenizer=None, name=name)

    def full(model, folder):
        (folder / "weights").write_text("ha")
        raise OSError(28, "No space left on device")

    folder = tmp_path / "model"
    monkeypatch.setattr(native, "save", save)
    export(named("first"), folder)
    monkeypatch.setattr(native, "save", full)
    with pytest.raises(Retry, match="model: No space left on device"):
        export(named("second"), folder)
    assert (folder / "weights").read_text() == "first"
    monkeypatch.setattr(native, "save", save)
    export(named("third"), folder)
    assert (folder / "weights").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def torn(model, folder):
        save(model, folder)
        (folder / "weights").write_text("fou")

    monkeypatch.setattr(native, "save", torn)
    with pytest.raises(Retry, match="model is not what was written to it"):
        export(named("fourth"), folder)


def test_weights_are_read_under_the_watchdog(tmp_path, mesh, model, monkeypatch):
    marks = []

    class Dog:
        def __init__(self, seconds):
            marks.append(seconds)

        def __enter__(self):
            marks.append("watched")

        def __exit__(self, *error):
            marks.append("end")

    def start():
        marks.append("start")
        return model[1]()

    monkeypatch.setattr(session_module, "Watchdog", Dog)
    with Checkpoints(tmp_path, {}, {}) as checkpoints:
        loop = LoopConfig(1, watchdog_seconds=7.0)
        session = Session(checkpoints, toy_run.Batches(toy_run.SETTINGS), mesh, loop)
        session.begin(model[0], start)
    assert marks == [7.0, "watched", "start", "end"]


def test_a_whole_model_is_exported_with_the_tokenizer_as_it_was_read(tmp_path):
    mini.save(tmp_path / "base")
    model = native.open_folder(tmp_path / "base")
    tokenize(model.tokenizer, ["a cat"], 4, None)  # which leaves its truncation set
    thread = threading.Thread(target=export, args=(model, tmp_path / "model"), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    written, read = (tmp_path / name / "tokenizer/tokenizer.json" for name in ("model", "base"))
    assert written.read_bytes() == read.read_bytes()
