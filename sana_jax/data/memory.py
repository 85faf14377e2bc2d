"""Keeps decoded images in memory, for small data sets that are read many times."""

import threading
from typing import Any

from sana_jax.data.images import MAX_PIXELS, MIN_SIDE, BadImage, decode
from sana_jax.data.records import Record, Source


class InMemory:
    """A source whose records hold pixels, uint8 (H, W, 3), in place of encoded bytes.

    Records stay after their first read, bad ones included, until the pixels fill `max_bytes`; the
    rest is read and decoded every time. The loaders' batches are the same with and without.
    """

    def __init__(
        self,
        source: Source,
        max_bytes: int = 4 << 30,
        max_pixels: int = MAX_PIXELS,
        min_side: int = MIN_SIDE,
    ):
        self.fingerprint = source.fingerprint
        self._source, self._limits = source, (max_pixels, min_side)
        self._kept: dict[int, Record | BadImage] = {}
        self._room, self._lock = max_bytes, threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Returns what another process needs, which keeps pixels of its own."""
        return vars(self) | {"_kept": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        found = self._kept.get(index)
        if found is None:
            found = self._read(index)
            size = 0 if isinstance(found, BadImage) else found["image"].nbytes
            with self._lock:
                if index not in self._kept and size <= self._room:
                    self._kept[index] = found
                    self._room -= size
        if isinstance(found, BadImage):
            raise found.with_traceback(None)  # or it would gather one at every raise
        return found

    def _read(self, index: int) -> Record | BadImage:
        key = f"record {index}"
        try:
            record = self._source[index]
            key = record["key"]
            return record | {"image": decode(record["image"], *self._limits)}
        except BadImage as error:
            error.key = error.key or key
            return error
