"""The output of a run while it trains: metrics.jsonl, TensorBoard, PNG grids, a progress bar."""

import contextlib
import json
import math
import os
import re
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath
from google.protobuf.message import DecodeError
from tqdm import tqdm

from sana_jax.pictures import Picture, encode_png, make_grid
from sana_jax.runtime.files import (
    check_is_file,
    check_is_folder,
    is_local,
    storage,
    write_atomically,
)
from sana_jax.runtime.hosts import log_first_host, on_first_host
from sana_jax.training.rows import row_of

# tensorboardX imports torch where it is installed; that takes seconds, and nothing here needs it.
_torch = sys.modules.get("torch")
sys.modules["torch"] = None
try:
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
finally:
    del sys.modules["torch"]
    if _torch is not None:
        sys.modules["torch"] = _torch

# Between two copies to a remote folder, whose files cannot be appended to; and between two syncs of
# the rows, without which a mounted object store does not have them.
UPLOAD_SECONDS = 60
FIRST_EVENTS = 3  # of an event file: its version, then the start that _Board writes


class MetricsWriter:
    """Writes the rows and pictures of a run to its folder; a context.

        workdir/metrics.jsonl      one row per line: {"step": 100, "loss": 0.25, ...}
        workdir/tensorboard/       the rows and pictures as event files
        workdir/images/NAME_STEP.png

    Only the first host writes. To a remote folder everything is copied now and then, and at the
    end.

    Attributes:
      made: what there is of the step that the run resumes from: "images", "held_out".
    """

    def __init__(self, workdir: str | epath.Path, step: int = 0, steps: int | None = None):
        """
        Args:
          workdir: the folder of the run.
          step: the step that the run resumes from; rows of later steps are dropped.
          steps: the steps of the whole run, for the progress bar.
        """
        self._remote, self._folder = None, Path("/nonexistent")
        self._step, self._steps, self._uploaded = step, steps, time.monotonic()
        self._copied: dict[Path, tuple[int, int]] = {}  # file -> time and size of its copy
        self.workdir, self._stack = epath.Path(workdir), contextlib.ExitStack()
        self.made: set[str] = set()
        self._on = jax.process_index() == 0

    def __enter__(self) -> "MetricsWriter":
        with storage(self.workdir):
            self.made = on_first_host(self._enter)
        return self

    def _enter(self) -> set[str]:
        """Opens the files, and returns `made`."""
        made = set()
        with contextlib.ExitStack() as stack:
            if not is_local(self.workdir):
                self._remote = self.workdir
                self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                if (self._remote / "metrics.jsonl").exists():
                    content = (self._remote / "metrics.jsonl").read_bytes()
                    (self._folder / "metrics.jsonl").write_bytes(content)
                stack.callback(self._upload)
            else:
                self._folder = Path(self.workdir)
            rows = self._folder / "metrics.jsonl"
            check_is_file(rows, str(rows))  # no later try would find it otherwise
            for name in "images", "tensorboard":
                check_is_folder(self._folder / name)
            (self._folder / "images").mkdir(parents=True, exist_ok=True)
            if rows.exists() and any("held_out_loss" in row for row in _keep(rows, self._step)):
                made.add("held_out")
            if any((self.workdir / "images").glob(f"*_{self._step:08d}.png")):
                made.add("images")
            self._rows = stack.enter_context(open(rows, "a"))
            self._board = _Board(self._folder / "tensorboard", self._step)
            stack.callback(self._board.close)
            self._bar = stack.enter_context(
                tqdm(total=self._steps, initial=self._step, unit=" step", disable=None)
            )
            self._stack = stack.pop_all()
        return made

    def __exit__(self, kind: type | None = None, *error) -> None:
        # An error that ends the run must not be hidden by one of closing files on a full disk.
        with storage(self.workdir) if kind is None else contextlib.suppress(Exception):
            self._stack.close()

    def tick(self) -> None:
        """Moves the progress bar by one step."""
        if self._on:
            self._bar.update()

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Writes a row of numbers; a number that is not finite becomes null in JSON."""
        if not self._on:
            return
        row = {name: _number(value) for name, value in row.items()}
        self._rows.write(json.dumps({"step": step, **row}) + "\n")
        self._rows.flush()
        for name, value in row.items():
            if value is not None:
                self._board.write(step, summary.scalar(name, value))
        shown = {k: f"{v:.4g}" for k, v in row.items() if v is not None and _is_shown(k)}
        self._bar.set_postfix(shown, refresh=False)
        if self._bar.disable:
            log_first_host(" ".join([f"step {step}", *map("=".join, shown.items())]))
        self._upload_if_due()

    def images(self, step: int, name: str, grid: list[list[Picture]]) -> None:
        """Writes rows of pictures as images/NAME_STEP.png and to TensorBoard."""
        if not self._on:
            return
        sheet = make_grid(grid)
        path = epath.Path(self._folder / "images" / f"{name}_{step:08d}.png")
        write_atomically(path, encode_png(sheet))
        self._board.write(step, summary.image(name, sheet, dataformats="HWC"))
        self._upload_if_due()

    def _upload_if_due(self) -> None:
        self._board.flush()
        if time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            os.fsync(self._rows.fileno())
            if self._remote is not None:
                self._upload()
            self._uploaded = time.monotonic()

    def _upload(self) -> None:
        """Copies the files that have changed since their last copy."""
        for path in filter(Path.is_file, self._folder.rglob("*")):
            status = path.stat()  # before reading: what is appended later is copied the next time
            now = status.st_mtime_ns, status.st_size
            if self._copied.get(path) != now:
                target = self._remote / path.relative_to(self._folder).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
                self._copied[path] = now


class _Board:
    """An event file of TensorBoard, written in the calling thread.

    tensorboardX's SummaryWriter has a thread for that, which a full disk ends without a word;
    whatever is written after that waits for ever.
    """

    def __init__(self, folder: Path, step: int):
        """Hides what a killed run left of steps after `step`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, entry: Any) -> None:
        """Adds a summary made by tensorboardX."""
        self._write(step=step, summary=entry)

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()

    def _write(self, **fields: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), **fields))


def _is_shown(name: str) -> bool:
    return "loss" in name or name in ("images_per_second", "skipped")


def _number(value: Any) -> float | int | None:
    value = value.item() if hasattr(value, "item") else value
    return value if math.isfinite(value) else None


def _keep(rows: Path, step: int) -> list[dict[str, Any]]:
    """Drops rows after `step`, and moves lines that are no rows to FILE.bad.

    A killed run may leave half a row, and a power cut or another program anything.

    Returns the rows of `step`.
    """
    kept, last, bad = [], [], []
    for line in rows.read_bytes().splitlines(keepends=True):
        row = row_of(line)
        if row is None:
            bad.append(line)
        elif row["step"] <= step:
            kept.append(line.rstrip(b"\n") + b"\n")
            last += [row] * (row["step"] == step)
    if bad:
        aside = rows.with_name(f"{rows.name}.bad")
        with aside.open("ab") as file:
            file.writelines(bad)
        size = sum(map(len, bad))
        log_first_host(f"{rows}: {size} bytes that are no whole row are now in {aside.name}")
    write_atomically(epath.Path(rows), b"".join(kept))
    return last


class Began(NamedTuple):
    """The start of one process of a run: when, in seconds since 1970, and from which step."""

    time: float
    step: int | None  # None: it was killed before its event file had any content


def starts_of(workdir: epath.Path) -> list[Began]:
    """Returns the starts of a run, in order: each has an event file. Raises OSError."""
    folder, found = workdir / "tensorboard", []
    for path in sorted(folder.glob("*.tfevents.*")) if folder.exists() else ():
        if not (began := re.search(r"\.tfevents\.(\d+)", path.name)):
            continue
        found.append(Began(float(began[1]), None))
        with path.open("rb") as file, contextlib.suppress(struct.error, DecodeError):
            for _ in range(FIRST_EVENTS):
                (size,) = struct.unpack("<Qxxxx", file.read(12))  # and a checksum
                event = Event.FromString(file.read(min(size, 2**16)))
                file.read(4)
                if event.HasField("session_log"):
                    found[-1] = Began(event.wall_time, event.step - 1)
                    break
    return found
