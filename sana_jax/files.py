"""Files that are there as a whole or not at all."""

import os

from etils import epath


def is_local(path: os.PathLike) -> bool:
    """Whether `path` is on a disk, which can rename, append and lock."""
    return "://" not in os.fspath(path)


def write_whole(path: epath.Path, content: bytes) -> None:
    """Writes a file whole or not at all; what was there stays until then. Raises OSError."""
    if not is_local(path):
        path.write_bytes(content)  # an object store shows no half of it
        return
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
