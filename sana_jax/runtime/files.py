"""Where files are, and files and folders that are there as a whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from sana_jax.runtime import lock
from sana_jax.runtime.errors import Retry, UserError


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


def write_atomically(path: epath.Path, content: bytes, part: str = ".part") -> None:
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError."""
    try:
        contents = json.loads(path.read_text())
    except OSError:
        raise UserError(f"{path} is missing") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds no JSON object")
    return contents


def sha256_of(path: Path) -> str:
    """Of a file's bytes, all of them read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_new(out: str) -> Path:
    """The path of --out, which must be missing or an empty folder. Raises UserError."""
    if not out:
        raise UserError("--out is empty: name a folder")
    path = Path(out).expanduser()
    try:
        _refuse_used(path, f"--out={out}")
    except OSError as error:
        raise UserError(f"--out={out:.60}: {error.strerror}") from None
    return path


def _refuse_used(path: Path, name: str) -> None:
    if path.exists() and not (path.is_dir() and all(p.name == lock.NAME for p in path.iterdir())):
        raise UserError(f"{name} exists and is not an empty folder")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Makes the folder; where the block raises, removes what is in it, and it if it is new.

    Raises UserError where something is in it already, or another process writes to it. Errors of
    the disk become UserErrors, and Retry where it is full.
    """
    made = []
    try:
        if not path.is_dir():  # of a folder its lock says more
            _refuse_used(path, str(path))
        made = [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=True)
        with lock.locked(path):
            _refuse_used(path, str(path))  # another may have been faster
            with _emptied_on_errors(path):
                yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            for new in made:
                new.rmdir()
        if isinstance(error, OSError):
            raise unwritten(str(path), error) from error
        raise


@contextlib.contextmanager
def _emptied_on_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for child in path.iterdir():
                if child.name != lock.NAME:
                    shutil.rmtree(child) if child.is_dir() else child.unlink()
        raise
