"""A folder of images as a source: `a/b.jpg`, its captions in `a/b.txt` or `a/b.json`.

All subfolders are read, in the order of their paths. Names that begin with a dot and `__MACOSX`
are skipped; links to files are followed, links to folders are not. A `.txt` holds one caption a
line; a `.json` holds {"captions": [...], "scores": [...], "truth": ...}, or "caption" with a single
one. If both files exist, the captions of the `.json` are used, if it has any.
"""

import json
import math
import os
import re
from collections.abc import Iterator

from etils import epath

from sana_jax.data.images import BadImage
from sana_jax.runtime.errors import Retry, UserError
from sana_jax.runtime.files import reason_of

SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff",
    ".webp",
)  # fmt: skip
MAX_CAPTION_BYTES = 1 << 20  # of one file


class Folder:
    """The records of a folder; keys are paths in it. Raises UserError if there is no image."""

    def __init__(self, root: epath.PathLike):
        self.root = epath.Path(root)
        files = dict(sorted(_walk(self.root, "")))
        self._images = [name for name in files if name.lower().endswith(SUFFIXES)]
        # By their names with the ending in lower case: cameras and Windows write IMG_1.TXT.
        texts = [name for name in files if name.lower().endswith((".txt", ".json"))]
        self._captions = {_lower_ending(name): name for name in sorted(texts)}
        if not self._images:
            raise UserError(
                f"{root}: no image in it or below; known are names that end with"
                f" {' '.join(SUFFIXES)}"
            )
        # A text that changes when a file comes, goes, or changes its size.
        self.listing = json.dumps(
            [[n, files[n]] for n in [*self._images, *sorted(self._captions.values())]]
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict:
        key = self._images[index]
        record = {"key": key, "image": self._read(key), "captions": [], "scores": [], "truth": ""}
        stem = key.rpartition(".")[0]
        found = {}
        if (name := self._captions.get(f"{stem}.json")) is not None:
            found = _parse_json(self._read_text(name), name)
        if "captions" not in found and (name := self._captions.get(f"{stem}.txt")) is not None:
            # Not str.splitlines, which also cuts at form feeds and at Unicode's separators.
            lines = re.split(r"\r\n|\r|\n", self._read_text(name))
            found["captions"] = [line.strip() for line in lines if line.strip()]
        return record | found

    def _read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            if self.root.exists():
                raise BadImage("unreadable", f"{name}: {reason_of(error)}") from None
            raise Retry(f"{self.root} is away; the same command may succeed later") from None
        except OSError as error:
            raise Retry(f"{self.root / name}: {reason_of(error)}; try again") from None

    def _read_text(self, name: str) -> str:
        data = self._read(name)
        if len(data) > MAX_CAPTION_BYTES:
            raise BadImage("bad_caption", f"{name} has {len(data)} bytes")
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise BadImage("bad_caption", f"{name} is not UTF-8 text") from None


def _walk(folder: epath.Path, prefix: str) -> Iterator[tuple[str, int]]:
    """Yields (path below the root, bytes) of every file."""
    for path in folder.iterdir():
        name = path.name
        if name.startswith(".") or name == "__MACOSX":
            continue
        if path.is_dir():
            if not os.path.islink(path):  # False for all that is remote
                yield from _walk(path, f"{prefix}{name}/")
        elif name.lower().endswith((*SUFFIXES, ".txt", ".json")):
            try:
                yield prefix + name, path.stat().length
            except OSError:  # a link to nowhere: reading it will say so, with its key
                yield prefix + name, -1


def _is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _lower_ending(name: str) -> str:
    stem, dot, ending = name.rpartition(".")
    return stem + dot + ending.lower()


def _parse_json(text: str, name: str) -> dict:
    """Returns a record's fields from a .json file; other fields are ignored.

    A file without captions, such as a downloader's metadata, has no "captions" in the result.
    """

    def bad(reason: str) -> BadImage:
        return BadImage("bad_caption", f"{name}: {reason}")

    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise bad(f"no JSON: {error}") from None
    if not isinstance(values, dict):
        raise bad("no JSON object")
    truth = values.get("truth", "")
    found = {"truth": truth if isinstance(truth, str) else json.dumps(truth, sort_keys=True)}
    if not {"captions", "caption"} & values.keys():
        return found
    captions = values.get("captions", [values.get("caption")])
    scores = values.get("scores", [])
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise bad('"captions" is no list of strings')
    if not isinstance(scores, list) or not all(_is_number(score) for score in scores):
        raise bad('"scores" is no list of finite numbers')
    if scores and len(scores) != len(captions):
        raise bad(f"{len(captions)} captions but {len(scores)} scores")
    kept = [i for i, caption in enumerate(captions) if caption.strip()]
    return found | {
        "captions": [captions[i].strip() for i in kept],
        "scores": [float(scores[i]) for i in kept] if scores else [],
    }
