"""A new folder for a checkpoint: there when it is finished, gone when it is not."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from sana_jax import lock
from sana_jax.errors import Retry, UserError
from sana_jax.files import is_full
from sana_jax.lock import locked


def check_new(out: str) -> Path:
    """The path of --out, which must be missing or an empty folder. Raises UserError."""
    path = Path(out).expanduser()
    try:
        occupied = path.exists() and (not path.is_dir() or _is_used(path))
    except OSError as error:
        raise UserError(f"--out={out:.60}: {error.strerror}") from None
    if not out:
        raise UserError("--out is empty: name a folder")
    if occupied:
        raise UserError(f"--out={out} exists and is not an empty folder")
    return path


def _is_used(folder: Path) -> bool:
    return any(child.name != lock.NAME for child in folder.iterdir())


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Makes the folder; where the block raises, removes what is in it, and it if it is new.

    Raises UserError where something is in it already, or another process writes to it. Errors of
    the disk become UserErrors, and Retry where it is full.
    """
    if path.is_file():
        raise UserError(f"{path} exists and is not an empty folder")
    made = []
    try:
        made = [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=True)
        with locked(path):
            if _is_used(path):
                raise UserError(f"{path} exists and is not an empty folder")
            with _emptied_on_errors(path):
                yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            for new in made:
                new.rmdir()
        if isinstance(error, OSError):
            raise (Retry if is_full(error) else UserError)(
                f"{path}: {error.strerror or error}"
            ) from error
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
