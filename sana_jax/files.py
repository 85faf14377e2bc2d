"""Files that are there as a whole or not at all."""

import os

from etils import epath


def is_local(path: os.PathLike) -> bool:
    """Whether `path` is on a disk, which can rename, append and lock."""
    return "://" not in os.fspath(path)


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
