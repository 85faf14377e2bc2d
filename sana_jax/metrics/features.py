"""The features of a set of pictures, computed batch by batch into a folder, a file a batch.

A file is there completely or not at all, and a batch is a function of its number. So a run that was
killed goes on with the first batch that is missing, and ends with the bits of an unbroken one; and
a set is measured once for all figures that read the same features. What decides the features gives
the folder its name.
"""

import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float

from sana_jax import sharding
from sana_jax.batch.manifest import key_of
from sana_jax.data.images import REASONS, BadImage, decoded
from sana_jax.data.loader import EvaluationLoader
from sana_jax.data.records import Record, Source
from sana_jax.data.rejections import Counts, Rejection
from sana_jax.data.transforms import Example
from sana_jax.metrics.resizes import Floats, Pixels, as_jpeg
from sana_jax.runtime import devices
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import local, reason_of, unwritten, write_atomically
from sana_jax.runtime.lock import locked
from sana_jax.runtime.progress import Progress

MOST = 50_000  # features that figures of single features read: evenly spread over more
ROWS = 1024  # of a block

Rows = Float[np.ndarray, "N D"]
Network = Callable[[Example], Float[Array, "B D"]]


class Prepared(NamedTuple):
    """A transform of a record: decoded, prepared for a network, and the tokens of its caption."""

    prepare: Callable[[Pixels], Floats]
    settings: dict[str, Any]  # everything that decides what `prepare` does
    tokenize: Callable[[str], np.ndarray] | None = None
    jpeg: bool = False  # as if the picture had been stored as a JPEG

    def __call__(self, record: Record, rng: np.random.Generator) -> Example:
        if self.tokenize is not None and not record["captions"]:
            raise BadImage("bad_caption", "it has no prompt")
        with decoded(record["image"], min_side=1) as pixels:
            row = {"image": self.prepare(as_jpeg(pixels) if self.jpeg else pixels)}
        if self.tokenize is not None:
            row["tokens"] = self.tokenize(record["captions"][0])
        return row


class Features:
    """Stored features, float32; `counts` says which pictures they are of."""

    def __init__(self, files: list[Path], counts: Counts):
        self._files, self.counts = files, counts

    def __len__(self) -> int:
        return self.counts.used

    def blocks(self) -> Iterator[Rows]:
        """Yields all of them in order, some hundred rows at a time."""
        held: list[Rows] = []
        for file in self._files:
            held.append(_read(file)[0])
            if sum(map(len, held)) >= ROWS:
                yield np.concatenate(held)
                held = []
        if held:
            yield np.concatenate(held)

    def some(self, most: int = MOST) -> Rows:
        """Returns all of them, or `most` that are evenly spread."""
        kept = len(self) * np.arange(most) // most if len(self) > most else np.arange(len(self))
        found, start = [], 0
        for rows in self.blocks():
            inside = kept[(kept >= start) & (kept < start + len(rows))]
            found.append(rows[inside - start])
            start += len(rows)
        return np.concatenate(found)

    def about(self, prefix: str = "") -> dict[str, Any]:
        """Returns what a result says of the pictures: their number, and each that is not in it."""
        rejected = {reason: n for reason, n in self.counts.rejected.items() if n}
        return {
            f"{prefix}count": self.counts.used,
            f"{prefix}rejected": rejected,
            f"{prefix}rejected_pictures": dict(self.counts.examples),
        }


@contextlib.contextmanager
def workdir(path: str | None) -> Iterator[Path]:
    """Yields the folder that features are stored in; None: one that goes with the process.

    Raises UserError if another process uses it, or it cannot be written.
    """
    if path is None:
        with tempfile.TemporaryDirectory(prefix="sana_jax_features_") as name:
            yield Path(name)
        return
    folder = local(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={path}: {reason_of(error)}") from None
    with locked(epath.Path(folder), "--workdir"):
        yield folder


def on_mesh(apply: Callable[[Any, Any], Array], params: Any, mesh: jax.sharding.Mesh) -> Network:
    """Returns the network apply(params, batch), compiled, for batches of the host's rows."""
    compiled = jax.jit(apply)

    def network(batch: Example) -> Array:
        with jax.set_mesh(mesh), jax.default_matmul_precision("float32"):
            return compiled(params, sharding.put_batch(batch, mesh))

    return network


def measure(
    source: Source,
    transform: Prepared,
    network: Callable[[], Network],
    folder: Path,
    settings: dict[str, Any],
    *,
    batch_size: int,
    count: int | None = None,
) -> Features:
    """Returns the features of the first `count` pictures of a source, computing what is missing.

    Args:
      transform: of a record; its settings decide the features too.
      network: called once if a batch is missing; returns what maps a batch to a row a picture.
      folder: of `workdir`.
      settings: everything else that decides the features, such as a hash of the weights.
      batch_size: pictures at once, a multiple of the devices that share them.

    Raises UserError if no picture can be used, Retry if a disk is full.
    """
    loader = EvaluationLoader(source, transform, batch_size=batch_size, limit=count)
    decides = settings | transform.settings | {"jpeg": transform.jpeg}
    decides |= {"source": source.fingerprint, "pictures": loader.records, "batch_size": batch_size}
    decides |= {"devices": devices.describe(), "jax": jax.__version__}
    place = folder / key_of(decides)[:16]
    files = [place / f"{step:06d}.npz" for step in range(len(loader))]
    try:
        place.mkdir(exist_ok=True)
        text = json.dumps(decides, indent=2, sort_keys=True) + "\n"
        write_atomically(epath.Path(place / "settings.json"), text.encode())
        missing = [step for step, file in enumerate(files) if not _is_whole(file)]
        done = loader.records - sum(_pictures(loader, step) for step in missing)
        with Progress(loader.records, "picture", initial=done) as bar:
            if missing:
                _compute(loader, missing, network(), files, bar)
    except OSError as error:
        raise unwritten(str(place), error) from error
    counts = Counts()
    for file in files:
        rows, rejections = _read(file)
        counts.add(len(rows), rejections)
    if not counts.used:
        raise UserError(f"no picture can be used: {counts}; for example {counts.some_examples()}")
    return Features(files, counts)


def _compute(
    loader: EvaluationLoader,
    steps: list[int],
    network: Network,
    files: list[Path],
    bar: Progress,
) -> None:
    """Computes the features of some batches; a file is written while the next batch is computed."""

    def write(step: int, rows: Array, valid: np.ndarray, rejections: list[Rejection]) -> None:
        kept = np.asarray(rows, np.float32)[valid]
        if not np.isfinite(kept).all():
            raise UserError(
                "the network computes NaN or infinite features: its weights are not those of a"
                " trained model, or need another --dtype"
            )
        content = io.BytesIO()
        np.savez(content, features=kept, rejected=np.array(json.dumps(rejections)))
        write_atomically(epath.Path(files[step]), content.getvalue())
        bar.update(_pictures(loader, step))

    last: tuple | None = None
    for step, (batch, rejections) in zip(steps, loader.batches(steps), strict=True):
        inputs = {name: x for name, x in batch.items() if name not in ("valid", "index")}
        rows = network(inputs)
        if last is not None:
            write(*last)
        last = step, rows, batch["valid"], rejections
    write(*last)


def _pictures(loader: EvaluationLoader, step: int) -> int:
    """Returns the number of pictures in a batch."""
    return min(loader.batch_size, loader.records - step * loader.batch_size)


def _is_whole(file: Path) -> bool:
    """Returns False for a file that is missing or damaged, whose batch is computed again."""
    if not file.is_file():
        return False
    try:
        _read(file)
    except Exception:  # NumPy and zipfile raise whatever they stumble on
        return False
    return True


def _read(file: Path) -> tuple[Rows, Iterable[Rejection]]:
    with np.load(file) as found:
        rejections = [Rejection(*each) for each in json.loads(str(found["rejected"]))]
        if any(each.reason not in REASONS for each in rejections):
            raise ValueError(f"{file} has other reasons")
        return found["features"], rejections
