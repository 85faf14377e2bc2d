"""Damage to the files of a data set, told in one line that names the file and what to do."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator

from array_record.python import array_record_module
from etils import epath

from sana_jax.data.records import NoData, thread_pool
from sana_jax.runtime.errors import Retry, UserError
from sana_jax.runtime.files import reason_of

ABOUT = ("dataset_info.json", "features.json")  # what TFDS writes about a data set


def damaged(path: os.PathLike | str, error: Exception | str, remedy: str) -> UserError:
    """Returns the error for a damaged file or folder. A file that is gone is NoData."""
    text = reason_of(error) if isinstance(error, OSError) else f"{error}"
    reason = " ".join(text.split()) or type(error).__name__
    kind = NoData if isinstance(error, FileNotFoundError) else UserError
    return kind(f"{path} is damaged ({reason:.200}); {remedy}")


@contextlib.contextmanager
def damage_named(folder: epath.Path, remedy: str) -> Iterator[None]:
    """Turns all that libraries raise where files in `folder` are damaged into UserErrors.

    Of TFDS' own files the one that does not parse is named, else the folder. Errors of the disk
    pass, but not that a file is missing.
    """
    try:
        yield
    except (UserError, Retry, MemoryError):
        raise
    except Exception as error:
        of_disk = isinstance(error, OSError) and error.errno  # TFDS raises others without
        if of_disk and not isinstance(error, FileNotFoundError):
            raise
        check_about(folder, remedy)
        raise damaged(folder, error, remedy) from error


def check_about(folder: epath.Path, remedy: str) -> None:
    """Raises UserError for the first of TFDS' files below a folder that holds no JSON object."""
    below = ("", "*/", "*/*/")  # of a data set, its configs, their versions; epath has no "**"
    for path in (path for name in ABOUT for part in below for path in folder.glob(part + name)):
        try:
            values = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict) or not values:
            raise damaged(path, "it holds no JSON object", remedy)


def check_shards(shards: Iterable[tuple[os.PathLike | str, int]], remedy: str) -> None:
    """Checks that ArrayRecord files have as many records as given, at least.

    ArrayRecord would open a file only when it is read, and of one that was cut between two of its
    blocks it reads records without a byte. Raises UserError for the first that is damaged, NoData
    if it is missing, and OSError.
    """

    def check(shard: tuple[os.PathLike | str, int]) -> None:
        path, records = shard
        try:
            with epath.Path(path).open("rb"):  # or ArrayRecord's error would be that of damage
                reader = array_record_module.ArrayRecordReader(os.fspath(path))
            try:
                found = reader.num_records()
            finally:
                reader.close()
        except (FileNotFoundError, RuntimeError, ValueError) as error:
            raise damaged(path, error, remedy) from error
        if found < records:
            raise damaged(path, f"it has {found} records of {records}", remedy)

    with thread_pool() as pool:
        for _ in pool.map(check, shards):
            pass
