"""Files that are there as a whole or not at all."""

import os

from etils import epath

from sana_jax.errors import Retry


def is_local(path: os.PathLike) -> bool:
    """Whether `path` is on a disk, which can rename, append and lock."""
    return "://" not in os.fspath(path)


def check_readable(path: os.PathLike) -> None:
    """Raises Retry where a file that was there cannot be read: its storage is away."""
    try:
        with epath.Path(path).open("rb") as file:
            file.read(1)
    except OSError as error:
        raise Retry(f"{path} cannot be read: {error.strerror or error}") from error


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
