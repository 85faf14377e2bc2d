"""Where files are, and files and folders that are there as a whole or not at all."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from sana_jax.errors import Retry, UserError


def is_local(path: str | os.PathLike) -> bool:
    """Whether `path` is on a disk, which can rename, append and lock."""
    return not re.match(r"\w+:/", os.fspath(path))  # pathlib leaves one slash of gs://bucket


def local(folder: str | os.PathLike) -> Path:
    """`folder`, unless it is an address: a path such as gs://bucket would be made beside us."""
    if not is_local(folder):
        raise UserError(f"{folder}: this is written to local folders only; copy it from there")
    return Path(folder)


# What opening a path raises; ImportError where what reads such addresses is not installed.
UNREACHABLE = OSError, ImportError


def reason_of(error: Exception) -> str:
    """Why a path could not be read or written, without the path."""
    return str(getattr(error, "strerror", None) or error)


def is_full(error: OSError) -> bool:
    """Whether a disk, or what a user may have of it, was full: the same may succeed later."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def unwritten(what: str, error: OSError) -> Exception:
    """What to raise of a file that cannot be written: Retry of a full disk, UserError otherwise."""
    return (Retry if is_full(error) else UserError)(f"{what}: {reason_of(error)}")


@contextlib.contextmanager
def storage(path: os.PathLike | None) -> Iterator[None]:
    """Turns an OSError of what is written to `path` into Retry, whatever its reason: a training
    must not be given up because of a disk."""
    try:
        yield
    except OSError as error:
        raise Retry(f"{path}: {reason_of(error)}") from error


def check_readable(path: os.PathLike) -> None:
    """Raises Retry where a file that was there cannot be read: its storage is away."""
    try:
        with epath.Path(path).open("rb") as file:
            file.read(1)
    except OSError as error:
        raise Retry(f"{path} cannot be read: {reason_of(error)}") from error


def write_whole(path: epath.Path, content: bytes, part: str = ".part") -> None:
    """Writes a file whole or not at all; what was there stays until then. Raises OSError.

    It is made under its name and `part`, which processes that write the same file must not share.
    """
    if not is_local(path):
        path.write_bytes(content)  # an object store shows no half of it
        return
    partial = path.with_name(path.name + part)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave the new name of an empty file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder, which takes the place of `folder` when the block has filled it.

    What was there stays until then, and where the block raises. Raises OSError.
    """
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
