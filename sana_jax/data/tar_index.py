"""Where the pictures of a tar and the files that belong to them are, for random access.

Members are matched as the files of a folder are: `a/b.c.json`, `a/b.c.txt` and `a/b.c.caption` hold
the captions of `a/b.c.jpg`, wherever they are in the tar. (WebDataset's own readers cut a name at
its first dot and know neighbours only: `cat.001.jpg` and `cat.002.jpg` are one sample to them.)

An index is built from the headers of all members, and kept in the user's cache folder until the
tar's size or time changes. Its file is a zip of arrays, which has checksums.
"""

import dataclasses
import hashlib
import io
import os
import tarfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Bool, UInt32

from sana_jax.data import sidecars
from sana_jax.data.folder import MAX_BYTES
from sana_jax.data.folder import SUFFIXES as PICTURES
from sana_jax.data.records import NoData
from sana_jax.runtime.devices import cache_folder
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import reason_of, write_atomically

VERSION = 1
BLOCK = tarfile.BLOCKSIZE
LATENTS = ".npy"
BESIDE = (*sidecars.SUFFIXES, ".npz")  # what may belong to a picture, in the order of the columns
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}


@dataclasses.dataclass(frozen=True)
class TarIndex:
    """The records of a tar, in the order of their pictures in it.

    Attributes:
      names: the members with the pictures, one after another, in UTF-8.
      ends: where each ends in `names`.
      places: of the picture and of each file of BESIDE, the first block of its content and its
        size in bytes; 0 and 0 without such a file.
      shapes: of the arrays, where a record is one (LATENTS): (channels, height, width).
      orphans: the members that belong to no picture.
      left_out: how many members are not read, by what they are.
      samples: how many WebDataset's own readers find.
      digest: a hash of all this.
    """

    names: np.ndarray
    ends: UInt32[np.ndarray, " N"]
    places: UInt32[np.ndarray, "N F 2"]
    shapes: UInt32[np.ndarray, "_ 3"]
    orphans: list[str]
    left_out: dict[str, int]
    samples: int
    digest: str

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, number: int) -> str:
        """Returns the name of a picture's member."""
        start = int(self.ends[number - 1]) if number else 0
        return self.names[start : int(self.ends[number])].tobytes().decode()

    def has(self, ending: str) -> Bool[np.ndarray, " N"]:
        """Returns which pictures have a file beside them with an `ending`."""
        return self.places[:, 1 + BESIDE.index(ending), 0] > 0

    def place(self, number: int, ending: str | None = None) -> tuple[int, int] | None:
        """Returns offset and size of a picture, or of the file beside it with an `ending`."""
        column = 0 if ending is None else 1 + BESIDE.index(ending)
        block, size = self.places[number, column].tolist()
        return (block * BLOCK, size) if block else None


class Member(NamedTuple):
    """A file in a tar; `offset` is that of its content, in bytes."""

    name: str
    offset: int
    size: int


def read_index(path: epath.Path, ending: str = "", done: Callable[[int], Any] = id) -> TarIndex:
    """Returns the index of a tar, from the cache if it is there; `done` gets the bytes passed.

    Args:
      ending: LATENTS for what stands in place of pictures; "": pictures.

    Raises NoData if the tar is missing, UserError if it is damaged or names two members alike.
    """
    try:
        about = path.stat()
    except FileNotFoundError:
        raise NoData(f"{path}: there is no such file") from None
    key = [VERSION, os.path.abspath(path), ending, about.length, about.mtime]
    if os.path.exists(path):
        key.append(os.stat(path).st_mtime_ns)
    try:
        name = hashlib.sha256(os.fspath(path.absolute()).encode() + ending.encode()).hexdigest()
        kept = epath.Path(cache_folder()) / "tars" / f"{name[:32]}.npz"
    except RuntimeError:  # there is no home
        return _build(path, ending, done)
    if (index := _load(kept, repr(key))) is None:
        index = _build(path, ending, done)
        _save(kept, repr(key), index)
    done(about.length)
    return index


def _load(kept: epath.Path, key: str) -> TarIndex | None:
    """Returns an index of the cache, or None if it is missing, damaged, or of another tar."""
    try:
        with np.load(io.BytesIO(kept.read_bytes()), allow_pickle=False) as arrays:
            if str(arrays["key"]) != key:
                return None
            return TarIndex(
                arrays["names"],
                arrays["ends"],
                arrays["places"],
                arrays["shapes"],
                arrays["orphans"].tolist(),
                dict(zip(arrays["what"].tolist(), arrays["counts"].tolist(), strict=True)),
                int(arrays["samples"]),
                str(arrays["digest"]),
            )
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file makes NumPy and zipfile raise nearly anything
        logging.warning("%s is made anew: %s", kept, error)
        return None


def _save(kept: epath.Path, key: str, index: TarIndex) -> None:
    data = io.BytesIO()
    np.savez(
        data,
        key=key,
        names=index.names,
        ends=index.ends,
        places=index.places,
        shapes=index.shapes,
        orphans=np.array(index.orphans, str),
        what=np.array([*index.left_out], str),
        counts=np.array([*index.left_out.values()], np.int64),
        samples=index.samples,
        digest=index.digest,
    )
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, data.getvalue(), f".{uuid.uuid4().hex}.part")
    except OSError as error:
        logging.warning("the index of a tar is not kept: %s: %s", kept.parent, reason_of(error))


def _build(path: epath.Path, ending: str, done: Callable[[int], Any]) -> TarIndex:
    pictures = (ending,) if ending else PICTURES
    left_out: dict[str, int] = {}
    found: list[Member] = []
    beside: dict[str, Member] = {}
    seen: set[str] = set()
    samples, last = 0, None
    for member in _members(path, left_out, done):
        name = member.name
        folder, slash, file = name.rpartition("/")
        sample = folder + slash + file.partition(".")[0]
        samples, last = samples + (sample != last), sample
        stem, dot, kind = name.rpartition(".")
        lower = stem + dot + kind.lower()
        if name in seen:
            raise UserError(
                f"{path}: two members are called {name!r:.200}; give every sample a name of its own"
            )
        if lower.endswith(pictures):
            seen.add(name)
            if member.size > MAX_BYTES:
                _count(left_out, f"pictures of more than {MAX_BYTES >> 20} MiB")
            else:
                found.append(member)
        elif lower.endswith(BESIDE):
            seen.add(name)
            beside[lower] = member
        else:
            _count(left_out, f"*.{kind.lower()}" if dot else "names without an ending")
    places = np.zeros((len(found), 1 + len(BESIDE), 2), np.uint32)
    used = set()
    for number, member in enumerate(found):
        stem = member.name.rpartition(".")[0]
        files = [member, *(beside.get(stem + each) for each in BESIDE)]
        used.update(stem + each for each in BESIDE)
        places[number] = [_place(file) for file in files]
    names = [member.name.encode(errors="backslashreplace") for member in found]
    blob = np.frombuffer(b"".join(names), np.uint8)
    ends = np.cumsum([len(name) for name in names], dtype=np.uint32)
    shapes = _shapes(path, found if ending == LATENTS else ())
    orphans = [member.name for lower, member in beside.items() if lower not in used]
    orphans = sorted(name.encode(errors="backslashreplace").decode() for name in orphans)
    hashed = blob.tobytes() + places.tobytes() + shapes.tobytes() + repr(orphans).encode()
    digest = hashlib.sha256(hashed).hexdigest()
    return TarIndex(blob, ends, places, shapes, orphans, left_out, samples, digest)


def _shapes(path: epath.Path, members: Sequence[Member]) -> UInt32[np.ndarray, "_ 3"]:
    """Returns the shapes that the headers of .npy files say; zeros for what is no such file."""
    shapes = np.zeros((len(members), 3), np.uint32)
    with path.open("rb") as file:
        for number, member in enumerate(members):
            file.seek(member.offset)
            try:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0
                read = read if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape = read(file)[0]
                if len(shape) > 2 and set(shape[:-3]) <= {1}:
                    shapes[number] = shape[-3:]
            except OSError:
                raise
            except Exception:  # a damaged header makes NumPy raise nearly anything
                continue
    return shapes


def _place(file: Member | None) -> tuple[int, int]:
    return (file.offset // BLOCK, min(file.size, 2**32 - 1)) if file else (0, 0)


def _members(
    path: epath.Path, left_out: dict[str, int], done: Callable[[int], Any]
) -> Iterator[Member]:
    """Yields the files of a tar; counts links and hidden files. Raises UserError if it is damaged.

    tarfile takes a header that it cannot read for the end.
    """
    with path.open("rb") as file:
        head = file.read(8)
        for magic, packer in _PACKED.items():
            if head.startswith(magic):
                raise UserError(f"{path} is packed by {packer}; unpack it, for random access")
        if not head:
            raise UserError(f"{path} is empty; {_REMEDY}")
        file.seek(0)
        last = ""
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # which would hold all of them
                    last = info.name
                    done(info.offset_data + info.size)
                    parts = [part for part in info.name.split("/") if part not in ("", ".")]
                    if info.isdir():
                        continue
                    if not info.isreg() or info.sparse:
                        _count(left_out, "links and other members that are no plain files")
                    elif any(part.startswith(".") or part == "__MACOSX" for part in parts):
                        _count(left_out, "hidden files")
                    elif parts:
                        yield Member("/".join(parts), info.offset_data, info.size)
                end = tar.offset
        except tarfile.TarError as error:
            raise UserError(f"{path} is cut short or damaged, {_after(last, error)}") from None
        file.seek(end)
        mark = file.read(BLOCK)
    if mark.strip(b"\0") or len(mark) < BLOCK:
        why = "a header is no header" if len(mark) == BLOCK else "there is no end mark"
        raise UserError(f"{path} is cut short or damaged, {_after(last, why)}")


_REMEDY = "download or make it again"


def _after(last: str, why: Exception | str) -> str:
    where = f"in or after {last!r:.200}" if last else "at its beginning"
    return f"{where} ({' '.join(str(why).split())}); {_REMEDY}"


def _count(left_out: dict[str, int], what: str) -> None:
    left_out[what] = left_out.get(what, 0) + 1
