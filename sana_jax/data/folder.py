"""A folder of images as a source: `a/b.jpg`, its captions in the files beside it (sidecars.py).

All subfolders are read, in the order of their paths, or those of a split (layout.py). Names that
begin with a dot and `__MACOSX` are skipped; links to files are followed, links to folders only
where they are the split. One line says what is not read, if there is any.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from absl import logging
from etils import epath

from sana_jax.data import layout, sidecars
from sana_jax.data.images import MAX_PIXELS, BadImage
from sana_jax.data.records import NoData
from sana_jax.data.sidecars import Sidecars
from sana_jax.runtime.errors import Retry
from sana_jax.runtime.files import is_local, reason_of

SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff",
    ".webp",
)  # fmt: skip
MAX_BYTES = 8 * MAX_PIXELS + 2**20  # of a file, which is read whole: four channels of 16 bits


class Folder:
    """The records of a folder; keys are paths in it, or in the folder of the split.

    Args:
      root: the folder.
      split: a name, by which layout.choose finds the images; None: all of them.

    Raises NoData if there is no image or no such split, UserError if it is not clear what to read.
    """

    def __init__(self, root: epath.PathLike, split: str | None = None):
        self.root = epath.Path(root)
        left_out: Counter[str] = Counter()
        files = sorted(_walk(self.root, "", split, left_out))
        images = [name for name in files if name.lower().endswith(SUFFIXES)]
        if not images:
            raise NoData(
                f"{root}: no image in it or below; known are names that end with"
                f" {' '.join(SUFFIXES)}"
            )
        chosen = layout.Choice("", lambda name: True, "")
        if split is not None:
            chosen = layout.choose(images, split, str(root))
        self._base = chosen.folder
        sizes = {name: self._size(name) for name in images if chosen.keeps(name)}
        self._images = [name for name, size in sizes.items() if size <= MAX_BYTES]
        left_out[f"images of more than {MAX_BYTES >> 20} MiB"] = len(sizes) - len(self._images)
        if not self._images:
            raise NoData(f"{root}: all images have more than {MAX_BYTES >> 20} MiB")
        texts = [name for name in files if self._has_captions(name, chosen.keeps)]
        self._captions = Sidecars(texts, self._images, self._open)
        left_out += self._captions.left_out
        self.orphans = [name.removeprefix(self._base) for name in self._captions.orphans]
        counted = ", ".join(f"{what} ({left_out[what]})" for what in sorted(+left_out)[:20])
        if chosen.note or counted:
            note = chosen.note or f"{len(self._images)} in all"
            logging.warning("%s: %s%s", root, note, f"; not read: {counted}" if counted else "")
        # A text that changes when a file comes, goes, or changes its size.
        sizes |= {name: self._size(name) for name in texts}
        listed = [*self._images, *texts]
        self.listing = json.dumps([[n.removeprefix(self._base), sizes[n]] for n in listed])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict:
        name = self._images[index]
        try:
            with self._open(name) as file:
                record = {"key": self.key_of(index), "image": file.read()}
            return record | self._captions[name]
        except BadImage as error:
            error.key = self.key_of(index)
            raise
        except OSError as error:
            raise Retry(f"{self.root / name}: {reason_of(error)}; try again") from None

    @property
    def places(self) -> list[tuple[str, int, int]]:
        """The files that the images are in, where links lead; (file, 0, 1) for each.

        Files of several names, which are hard links, are called by their numbers on the disk.
        """
        folders: dict[str, str] = {}

        def file_of(name: str) -> str:
            path = os.fspath(self.root / name)
            if not is_local(path):
                return path
            folder, file = os.path.split(path)
            if folder not in folders:
                folders[folder] = os.path.realpath(folder)
            with contextlib.suppress(OSError):  # it is gone: reading it will say so
                if (about := os.stat(path)).st_nlink > 1:
                    return f"{about.st_dev}:{about.st_ino}"
            return os.path.realpath(path) if os.path.islink(path) else f"{folders[folder]}/{file}"

        return [(file_of(name), 0, 1) for name in self._images]

    def key_of(self, index: int) -> str:
        return self._images[index].removeprefix(self._base)

    def _has_captions(self, name: str, keeps) -> bool:
        folder, slash, file = name.rpartition("/")
        if file in sidecars.METADATA:
            return keeps(name) or self._base.startswith(folder + slash)
        return name.lower().endswith(sidecars.SUFFIXES) and keeps(name)

    def _open(self, name: str) -> BinaryIO:
        try:
            return (self.root / name).open("rb")
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            if self.root.exists():
                raise BadImage("unreadable", f"{name}: {reason_of(error)}") from None
            raise Retry(f"{self.root} is away; the same command may succeed later") from None

    def _size(self, name: str) -> int:
        try:
            return (self.root / name).stat().length
        except OSError:  # a link to nowhere: reading it will say so, with its key
            return -1


def _walk(
    folder: epath.Path, prefix: str, split: str | None, left_out: Counter[str]
) -> Iterator[str]:
    """Yields the paths below the root of images and their captions; counts all other files."""
    for path in folder.iterdir():
        name = path.name
        below = f"{prefix}{name}/"
        if name.startswith(".") or name == "__MACOSX":
            left_out["hidden images"] += name.lower().endswith(SUFFIXES)
        elif path.is_dir():
            # Of a link os.path.islink is False for all that is remote.
            if not os.path.islink(path) or _is_split(below, split):
                yield from _walk(path, below, split, left_out)
            else:
                left_out["linked folders"] += 1
        elif name in sidecars.METADATA or name.lower().endswith((*SUFFIXES, *sidecars.SUFFIXES)):
            if is_local(path) and not os.path.isfile(path):  # opening a pipe would wait
                left_out["pipes and sockets" if os.path.exists(path) else "links to nothing"] += 1
            else:
                yield prefix + name
        else:
            left_out[f"*{os.path.splitext(name)[1].lower() or ' without an ending'}"] += 1


def _is_split(folder: str, split: str | None) -> bool:
    """Returns whether a linked folder leads to a split; below it there are no such folders."""
    if split is None:
        return False
    called = layout.split_of(folder) and folder.count("/") == 1
    return bool(called) or f"{split.strip('/')}/".startswith(folder)
