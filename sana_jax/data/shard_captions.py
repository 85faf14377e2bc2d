"""The captions and scores that SANA's own code keeps beside a tar, by the names of its samples.

Only where each sample's part of such a file is stays in memory. What the files hold is described in
webdataset.py.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int64

from sana_jax.data.images import BadImage
from sana_jax.data.tar_index import TarIndex
from sana_jax.runtime.errors import Retry, UserError
from sana_jax.runtime.files import reason_of

OWN = "prompt"  # the style of the captions that are in the tar
_SPACE = re.compile(r"\s*")


class ShardCaptions:
    """What stands beside one tar, for each of its records.

    Args:
      files: those beside it whose names begin as its own; of these the ones count that have an
        object for a sample.

    Attributes:
      digest: changes when a file comes, goes or changes; "" without files.

    Raises UserError for a file that is not JSON, and OSError.
    """

    def __init__(self, files: Sequence[epath.Path], index: TarIndex):
        self._files: list[epath.Path] = []
        self._spans: list[Int64[np.ndarray, "N 2"]] = []
        digest = hashlib.sha256()
        names = (index.name(i) for i in range(len(index))) if files else ()
        numbers = {name.rpartition(".")[0]: i for i, name in enumerate(names)}
        for path in files:
            data = path.read_bytes()
            spans = np.zeros((len(index), 2), np.int64)
            for sample, start, size in _entries(data, path):
                if sample in numbers:
                    spans[numbers[sample]] = start, size
            if spans.any():
                digest.update(path.name.encode() + data)
                self._files.append(path)
                self._spans.append(spans)
        self.digest = digest.hexdigest() if self._files else ""

    def added(self, number: int, fields: dict[str, Any]) -> dict[str, Any]:
        """Returns a record's fields with those beside its tar. Raises BadImage."""
        if not self._files:
            return fields
        captions: dict[str, str] = {}
        scores: dict[str, float] = {}
        for path, spans in zip(self._files, self._spans, strict=True):
            start, size = spans[number].tolist()
            of_scores = "score" in path.name
            for style, value in self._read(path, start, size).items():
                if of_scores or not isinstance(value, str):
                    scores[style] = _points(value, path)
                elif value.strip():
                    captions[style] = value.strip()
        own = fields["captions"]
        styles = [OWN] * len(own) + [*captions]
        points = fields["scores"] or [scores.get(OWN, 0.0)] * len(own)
        points = points + [scores.get(style, 0.0) for style in captions]
        described = json.dumps({"captions": [{"style": style} for style in styles]})
        return {
            "captions": own + [*captions.values()],
            "scores": points if scores or fields["scores"] else [],
            "truth": fields["truth"] or described,
        }

    def _read(self, path: epath.Path, start: int, size: int) -> dict[str, Any]:
        if not size:
            return {}
        try:
            with path.open("rb") as file:
                file.seek(start)
                values = json.loads(file.read(size))
            if isinstance(values, dict):
                return values
        except OSError as error:
            raise Retry(f"{path}: {reason_of(error)}; try again") from None
        except (ValueError, RecursionError):
            pass
        raise BadImage("bad_caption", f"{path.name} has changed, or holds no object for it")


def beside_tar(tar: epath.Path, names: Sequence[str]) -> list[epath.Path]:
    """Returns the files for a tar, of those `names` in its folder: 00000.json, 00000_a.json."""
    stem = tar.name.removesuffix(".tar")
    pattern = re.compile(re.escape(stem) + r"([^0-9].*)?\.json")
    return [tar.parent / name for name in sorted(names) if pattern.fullmatch(name)]


def _points(value: Any, path: epath.Path) -> float:
    try:
        points = float(value)
        if math.isfinite(points):
            return points
    except (TypeError, ValueError, OverflowError):
        pass
    raise BadImage("bad_caption", f"{path.name}: {value!r:.60} is no finite number")


def _entries(data: bytes, path: epath.Path) -> Iterator[tuple[str, int, int]]:
    """Yields the keys of an object whose values are objects, and their first bytes and sizes.

    Raises UserError if it is not JSON. JSON of another kind has none.
    """
    read = json.JSONDecoder().raw_decode
    try:
        text = data.decode()
        at = _skip(text, 0)
        passed = place = 0  # characters, and the bytes that they have
        if text[at] != "{":
            json.loads(text)
            return
        at = _skip(text, at + 1)
        while text[at] != "}":
            key, at = read(text, at)
            at = _skip(text, at)
            start = _skip(text, at + 1)
            value, end = read(text, start)
            if text[at] != ":" or not isinstance(key, str):
                raise ValueError("it has no key")
            if isinstance(value, dict):
                place += len(text[passed:start].encode())
                size = len(text[start:end].encode())
                yield key, place, size
                passed, place = end, place + size
            at = _skip(text, end)
            if text[at] == ",":
                at = _skip(text, at + 1)
            elif text[at] != "}":
                raise ValueError(f"there is a {text[at]!r} between two entries")
    except (ValueError, IndexError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({' '.join(str(error).split())})") from None


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()
