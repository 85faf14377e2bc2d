"""Rows, event files and pictures are there, also after a run that was killed."""

import json

import numpy as np
from etils import epath
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from sana_jax.training import metrics_writer
from sana_jax.training.metrics_writer import MetricsWriter, make_grid


def events(folder):
    """The events of all files: records of length, its checksum, the content, its checksum."""
    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            found.append(Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
    return found


def picture(value, height=4, width=6):
    return np.full((height, width, 3), value, np.uint8)


def test_rows_pictures_and_events(tmp_path, capsys):
    with MetricsWriter(tmp_path, steps=10) as writer:
        writer.tick()
        writer.write(1, {"loss": np.float32(0.5), "data_wait": 0.25})
        writer.write(2, {"loss": float("nan"), "skipped": 1})
        writer.images(2, "pairs", [[picture(1), picture(2)], [picture(3)]])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": 1, "loss": 0.5, "data_wait": 0.25},
        {"step": 2, "loss": None, "skipped": 1},
    ]
    sheet = np.asarray(Image.open(tmp_path / "images" / "pairs_00000002.png"))
    assert (sheet == make_grid([[picture(1), picture(2)], [picture(3)]])).all()
    values = {(e.step, v.tag): v for e in events(tmp_path) for v in e.summary.value}
    assert values[1, "loss"].simple_value == 0.5 and (2, "loss") not in values
    assert values[2, "pairs"].image.width == sheet.shape[1]
    assert capsys.readouterr().err.startswith("step 1 loss=0.5\nstep 2 ")


def test_rows_after_the_step_are_dropped(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in 5, 10, 15:
            writer.write(step, {"loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    with MetricsWriter(tmp_path, step=12) as writer:
        writer.write(15, {"loss": 2.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(5, 1.0), (10, 1.0), (15, 2.0)]
    starts = [e.step for e in events(tmp_path) if e.HasField("session_log")]
    assert 13 in starts  # TensorBoard hides what the run before wrote from there on


def test_grid():
    sheet = make_grid([[picture(1), picture(2, 2, 3)], [picture(3)]], gap=1)
    assert sheet.shape == (9, 13, 3)
    assert (sheet[:4, :6] == 1).all() and (sheet[5:, :6] == 3).all()
    assert (sheet[:2, 7:10] == 2).all() and sheet[4].min() == 255 and sheet[5:, 7:].min() == 255


def test_other_hosts_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_writer.jax, "process_index", lambda: 1)
    with MetricsWriter(tmp_path / "run") as writer:
        writer.tick()
        writer.write(1, {"loss": 1.0})
        writer.images(1, "pairs", [[picture(1)]])
    assert not (tmp_path / "run").exists()


def test_remote_folder_gets_copies(tmp_path, monkeypatch):
    class Remote(type(epath.Path("/"))):
        def __str__(self):
            return "gs://" + super().__str__().lstrip("/")

    for step in 0, 1:
        with MetricsWriter(tmp_path, step) as writer:
            writer.workdir = Remote(tmp_path / "remote")
            writer.__exit__()
            with writer:
                writer.write(step + 1, {"loss": 1.0})
                writer.images(step + 1, "pairs", [[picture(1)]])
    lines = (tmp_path / "remote" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert len([*(tmp_path / "remote" / "images").iterdir()]) == 2
