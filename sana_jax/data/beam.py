"""Encodes a data set by an Apache Beam pipeline, one shard a work item.

A work item is a number: the shard's name and content follow from it and from the settings. It is
done where its file and the marker beside it, with the file's sha256, are there; so an item may be
given out twice, and a pipeline that was killed be started again. The folder is one that all workers
see by the same path. The command itself writes the settings first and the index last.
"""

import functools
import logging
import re
import threading
import uuid
from pathlib import Path
from typing import Any

from sana_jax.data import precomputed
from sana_jax.data.begun import begun
from sana_jax.data.encode import encode_shard, shards_of, write_index
from sana_jax.data.encoding import Encoding, Opened
from sana_jax.data.rejections import Counts
from sana_jax.runtime.errors import Retry, UserError

PART = ".beam.tmp"  # ends the names of files that are not finished
# Beam adds to an error of a worker where it came from, or passes on its text alone.
ERROR = re.compile(r"\.(UserError|Retry): (.*?)(?: \[while running|\n|$)")
_lock = threading.Lock()


def open_pipeline(runner: str, options: list[str]) -> Any:
    """Returns an empty pipeline on a runner of Beam's, such as DirectRunner.

    `options` are Beam's and the runner's own, NAME=VALUE. Raises UserError where Beam is missing,
    or refuses them.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            f"--runner={runner} needs Apache Beam ({error}): pip install 'sana_jax[beam]'"
        ) from None
    given = [f"--runner={runner}", *(f"--{option.lstrip('-')}" for option in options)]
    try:
        return beam.Pipeline(options=PipelineOptions(given))
    except (ValueError, SystemExit) as error:  # SystemExit: argparse prints its own line
        flags = " ".join([f"--runner={runner}", *(f"--beam={option}" for option in options)])
        raise UserError(f"{flags}: {error}") from None


def precompute_by_beam(
    encoding: Encoding, folder: Path, settings: dict[str, Any], pipeline: Any
) -> dict[str, Any]:
    """Writes the missing shards, each on one worker, and then the index, which it returns.

    `folder` is locked by the caller and seen by all workers; `pipeline` is an empty one. Raises
    UserError and Retry as `encode.precompute` does.
    """
    import apache_beam as beam

    settings = begun(folder, settings)
    _sweep(folder)
    encode = functools.partial(encode_item, encoding=encoding, folder=folder, settings=settings)
    numbers = pipeline | "Shards" >> beam.Create(range(shards_of(settings)))
    # Without it a runner may give all shards to one worker.
    numbers | "Spread" >> beam.Reshuffle() | "Encode" >> beam.Map(encode)
    for name in "common", "worker":  # which log the traceback of what is raised here anyway
        logging.getLogger(f"apache_beam.runners.{name}").setLevel(logging.CRITICAL)
    try:
        pipeline.run().wait_until_finish()
    except Exception as error:
        if found := ERROR.search(f".{type(error).__name__}: {error}"):
            raise {"UserError": UserError, "Retry": Retry}[found[1]](found[2]) from error
        raise
    _sweep(folder)
    return write_index(folder, settings)


def encode_item(number: int, encoding: Encoding, folder: Path, settings: dict[str, Any]) -> int:
    """Encodes a shard unless it is there, and returns its number."""
    from apache_beam.metrics import Metrics  # on the worker

    entry = precomputed.finished_shard(folder, number)
    if entry is None:
        with _lock:  # threads of a worker would each place the weights
            opened = _opened(encoding)
            if opened.source.fingerprint != settings["source"]:
                raise UserError(f"{encoding.data} is another data set on this worker")
            with opened.computing():
                part = f".{uuid.uuid4().hex}{PART}"
                given = opened.source, opened.transform, opened.encoder, folder, settings, number
                entry = encode_shard(*given, part=part)
    counts = Counts.from_state(entry["counts"])
    for name in "read", "used":
        Metrics.counter("sana_jax", name).inc(getattr(counts, name))
    return number


@functools.cache
def _opened(encoding: Encoding) -> Opened:
    """Returns what an encoding needs, opened once a process."""
    return encoding.open(resumes=True)


def _sweep(folder: Path) -> None:
    """Removes what workers that were killed have left; no other pipeline writes to the folder."""
    for path in folder.glob(f"*{PART}"):
        path.unlink(missing_ok=True)
