"""Rows, event files and pictures are written, also after a run that was killed."""

import json
import threading
import time
from functools import partial

import numpy as np
import pytest
from etils import epath
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from sana_jax.pictures import make_grid
from sana_jax.runtime.errors import Retry, Stopped, UserError
from sana_jax.runtime.files import storage
from sana_jax.training import metrics_writer
from sana_jax.training.metrics_writer import MetricsWriter, starts_of


def events(folder):
    """Returns the events of all files: records of length and content, each with a checksum."""
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


@pytest.mark.parametrize(
    "bad",
    [
        b'{"step": 9, "lo',
        b"\0" * 4096,
        b"\x80\xff\x00\n",
        b'{"loss": ' + b"[" * 100_000 + b"\n",
        b'{"loss": 1.0}\n',
        b'["step"]\n',
        b'{"step": "7"}\n',
        b'{"step": ' + b"7" * 5000 + b"}\n",
    ],
)
@pytest.mark.parametrize("after", [b"", b'{"step": 11, "loss": 1.0}\n'])
def test_lines_that_are_no_rows_are_set_aside(tmp_path, capsys, bad, after):
    rows = b'{"step": 5, "loss": 1.0}\n{"step": 10, "loss": 1.0}\n'
    if after and not bad.endswith(b"\n"):
        bad += b"\n"  # otherwise the row after it is no whole line
    (tmp_path / "metrics.jsonl").write_bytes(rows + bad + after)
    with MetricsWriter(tmp_path, step=11) as writer:
        writer.write(15, {"loss": 2.0})
    written = (tmp_path / "metrics.jsonl").read_bytes()
    assert written == rows + after + b'{"step": 15, "loss": 2.0}\n'
    assert (tmp_path / "metrics.jsonl.bad").read_bytes() == bad
    told = f"metrics.jsonl: {len(bad)} bytes that are no whole row are now in metrics.jsonl.bad\n"
    assert capsys.readouterr().err.count(told) == 1


def test_a_last_row_without_its_end_of_line_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 5}\n{"step": 10, "loss": 1.0}')
    with MetricsWriter(tmp_path, step=11) as writer:
        writer.write(15, {"loss": 2.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 15]


def test_a_picture_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """A resumed run does not draw the pictures again that it finds."""

    def full(path, content, part=".part"):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError), MetricsWriter(tmp_path, step=2) as writer:
        monkeypatch.setattr(metrics_writer, "write_atomically", full)
        writer.images(2, "pairs", [[picture(1)]])
    monkeypatch.undo()
    with MetricsWriter(tmp_path, step=2) as writer:
        assert "images" not in writer.made


def test_nothing_is_written_behind_our_back(tmp_path, monkeypatch):
    """A writing thread would end without a word, and whoever waits for it would wait for ever."""
    threads = {*threading.enumerate()}
    with pytest.raises(Retry, match="No space"), MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        new = {thread.name for thread in {*threading.enumerate()} - threads}
        assert new <= {"tqdm_monitor"}
        fail = partial(fail_with, OSError(28, "No space left on device"))
        monkeypatch.setattr(metrics_writer.EventsWriter, "write_event", fail)
        with storage(tmp_path):
            writer.write(2, {"loss": 1.0})


def fail_with(error, *args, **options):
    raise error


def test_nobody_listens(tmp_path, monkeypatch):
    """A terminal that has gone away is no reason to end a run."""
    monkeypatch.setattr("builtins.print", partial(fail_with, BrokenPipeError(32, "Broken pipe")))
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 1.0}


def test_other_hosts_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_writer.jax, "process_index", lambda: 1)
    with MetricsWriter(tmp_path / "run") as writer:
        writer.tick()
        writer.write(1, {"loss": 1.0})
        writer.images(1, "pairs", [[picture(1)]])
    assert not (tmp_path / "run").exists()


def test_remote_folder_gets_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_writer, "is_local", lambda path: False)
    for step in 0, 1:
        with MetricsWriter(tmp_path / "remote", step) as writer:
            writer.write(step + 1, {"loss": 1.0})
            writer.images(step + 1, "pairs", [[picture(1)]])
        assert not writer._folder.exists()
    lines = (tmp_path / "remote" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert len([*(tmp_path / "remote" / "images").iterdir()]) == 2


def test_remote_folder_gets_what_changed(tmp_path, monkeypatch):
    copied = []

    class Counting(type(epath.Path("/"))):
        def write_bytes(self, content):
            copied.append(self.name)
            return super().write_bytes(content)

    monkeypatch.setattr(metrics_writer, "is_local", lambda path: False)
    monkeypatch.setattr(metrics_writer, "UPLOAD_SECONDS", -1)
    with MetricsWriter(Counting(tmp_path / "remote")) as writer:
        writer.images(1, "pairs", [[picture(1)]])
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": 1.0})
    assert copied.count("pairs_00000001.png") == 1
    rows = (tmp_path / "remote" / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in rows.splitlines()] == [1, 2]


def test_rows_are_synced_now_and_then(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(metrics_writer.os, "fsync", synced.append)
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        assert writer._rows.fileno() not in synced
        monkeypatch.setattr(metrics_writer, "UPLOAD_SECONDS", -1)
        writer.write(2, {"loss": 1.0})
        assert writer._rows.fileno() in synced


def test_a_full_disk_at_the_end_hides_nothing(tmp_path):
    def full():
        raise OSError(28, "No space left on device")

    with pytest.raises(Retry, match=f"{tmp_path}: No space left on device"):
        with MetricsWriter(tmp_path) as writer:
            writer._stack.callback(full)
    with pytest.raises(Stopped), MetricsWriter(tmp_path) as writer:
        writer._stack.callback(full)
        raise Stopped("by SIGTERM")
    assert writer._rows.closed


@pytest.mark.parametrize("name", ["metrics.jsonl", "images", "tensorboard"])
def test_what_no_later_try_could_open_is_named(tmp_path, name):
    """A launcher would try again a hundred times."""
    if name == "metrics.jsonl":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"{name} is .* is needed"), MetricsWriter(tmp_path):
        pass


def test_the_starts_of_a_run_are_read_back_whatever_a_kill_left(tmp_path, monkeypatch):
    folder = epath.Path(tmp_path)
    assert starts_of(folder) == []
    for step, now in (0, 10**9), (4, 2 * 10**9):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        with MetricsWriter(tmp_path, step, 10) as writer:
            writer.write(step + 1, {"loss": 1.0})
    assert starts_of(folder) == [(10**9, 0), (2 * 10**9, 4)]
    (board,) = {path.parent for path in tmp_path.rglob("*.tfevents.*")}
    for number, content in enumerate((b"", b"\xff" * 64, b"\x20" + 11 * b"\0" + b"ab")):
        (board / f"events.out.tfevents.{4 * 10**9 + number}.host").write_bytes(content)
    assert [start.step for start in starts_of(folder)] == [0, 4, None, None, None]
    assert starts_of(folder)[-1].time == 4 * 10**9 + 2
