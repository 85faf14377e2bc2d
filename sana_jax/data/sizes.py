"""Reads the sizes of all images of a source, which buckets need before the first batch."""

import io
import uuid
from pathlib import Path

import jax
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Int32

from sana_jax.data.images import MAX_PIXELS, REASONS, BadImage, size_of
from sana_jax.data.records import Source, thread_pool
from sana_jax.data.rejections import Counts, Rejection
from sana_jax.runtime import hosts
from sana_jax.runtime.files import unwritten, write_atomically
from sana_jax.runtime.progress import Progress

CODES = (None, *REASONS)  # why there is no size, as the file has it


def image_sizes(
    source: Source,
    cache: str | Path | None = None,
    threads: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Int32[np.ndarray, "N 2"], Counts]:
    """Returns (height, width) of every image, from its header; (0, 0) if it cannot be used.

    Every host reads its share, and all hosts must call this.

    Args:
      cache: a folder, made if missing, that keeps the result for the next time, in a file named
        after the source's fingerprint, the same one for all hosts; None: nothing is kept.
      threads: for reading; None: as many as there are cores, up to 16.
      max_pixels: of an image that is used.

    The counts say why images cannot be used; pixels are not decoded, so more may turn out bad.
    """
    limit = f"-{max_pixels}" if max_pixels != MAX_PIXELS else ""
    path = Path(cache) / f"sizes-{source.fingerprint}{limit}.npz" if cache is not None else None
    kept = hosts.raise_together(_load, path, len(source)) if path is not None else None
    if not all(hosts.gather_values(kept is not None)):
        share = -(-len(source) // jax.process_count())
        first = share * jax.process_index()
        mine = range(first, first + share)
        mine = hosts.raise_together(_read, source, mine, threads, max_pixels)
        # Every share has the same length: the last ones may hold zeros beyond the source.
        kept = tuple(array[: len(source)] for array in hosts.gather_arrays(mine))
        if path is not None:
            hosts.on_first_host(_save, path, *kept)
    sizes, codes = kept
    counts = Counts(read=len(sizes), used=int((codes == 0).sum()))
    for code, count in zip(*np.unique(codes[codes > 0], return_counts=True), strict=True):
        counts.rejected[CODES[code]] = int(count)
    if counts.used < counts.read:
        logging.warning("sizes of images: %s", counts)
    return sizes, counts


def _read(
    source: Source, share: range, threads: int | None, max_pixels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns sizes and codes of the existing records of a share."""
    sizes = np.zeros((len(share), 2), np.int32)
    codes = np.zeros(len(share), np.uint8)
    indices = range(share.start, min(share.stop, len(source)))
    seen = Counts()

    def look(index: int) -> Rejection | None:
        key = f"record {index}"
        try:
            record = source[index]
            key = record["key"]
            sizes[index - share.start] = size_of(record["image"], max_pixels)
            return None
        except BadImage as error:
            codes[index - share.start] = CODES.index(error.reason)
            return Rejection(error.key or key, error.reason, str(error))

    with thread_pool(threads) as pool:
        # In parts: a pool would take all of a large source at once.
        parts = (indices[i : i + 4096] for i in range(0, len(indices), 4096))
        with Progress(len(indices), "image", "sizes") as progress:
            for part in parts:
                seen.add(0, filter(None, pool.map(look, part)))
                progress.update(len(part))
    return sizes, codes


def _load(path: Path, count: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns what `_save` wrote, or None if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            sizes, codes = arrays["sizes"], arrays["codes"]
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file makes NumPy and zipfile raise nearly anything
        logging.warning("%s is read anew: %s", path, error)
        return None
    fits = (
        sizes.shape == (count, 2) and codes.shape == (count,) and codes.max(initial=0) < len(CODES)
    )
    return (sizes, codes) if fits else None


def _save(path: Path, sizes: np.ndarray, codes: np.ndarray) -> None:
    data = io.BytesIO()
    np.savez_compressed(data, sizes=sizes, codes=codes)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Other hosts may write the same.
        write_atomically(epath.Path(path), data.getvalue(), f".{uuid.uuid4().hex}.part")
    except OSError as error:
        raise unwritten(f"cache {path.parent}", error) from None
