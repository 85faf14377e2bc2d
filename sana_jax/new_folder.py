"""A new folder for a checkpoint: there when it is finished, gone when it is not."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from sana_jax import lock
from sana_jax.errors import UserError
from sana_jax.files import unwritten


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
