"""Looks at every picture of a source, and writes down what the data set is.

report.json      counts, sizes, captions, and the pictures of each bucket
pictures.jsonl   every picture that can be used: key, size, bucket, captions
rejected.jsonl   every one that cannot, and each file without a picture: key, reason, detail
aspects.png      a histogram of the aspect ratios, by bucket
contact.png      some of the pictures
parts/           what is known of each part of the source, which a second run does not read again
"""

import collections
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sana_jax.data.begun import begun, write_json
from sana_jax.data.images import BadImage, cover_crop, decode
from sana_jax.data.records import Source, thread_pool
from sana_jax.data.rejections import Counts, Rejection
from sana_jax.models import buckets
from sana_jax.pictures import Picture, in_rows, make_grid, save_png
from sana_jax.runtime.progress import Progress
from sana_jax.text.prompts import mend

PART = 1024  # records
SHOWN, COLUMNS, SIDE = 48, 8, 128  # pictures of the contact sheet, and pixels of one
NO_PICTURE = "no_picture"

Looked = dict[str, Any]  # one record


def report(source: Source, folder: Path, settings: dict[str, Any], base: int) -> dict[str, Any]:
    """Writes the files above to a folder, and returns what report.json holds.

    Args:
      settings: what decides the result; a folder is continued with the same alone.
      base: pixels, of the buckets.

    Raises UserError if the folder was begun with other settings.
    """
    begun(folder, settings)
    parts = folder / "parts"
    parts.mkdir(exist_ok=True)
    kept: list[dict[str, np.ndarray]] = []  # numbers alone, for there may be millions of pictures
    bad: list[Looked] = []
    for looked in _parts(source, parts):
        kept.append(_numbers([each for each in looked if "reason" not in each]))
        bad += [each for each in looked if "reason" in each]
    numbers = {name: np.concatenate([each[name] for each in kept]) for name in kept[0]}
    table = buckets.training_buckets(base)
    places = buckets.assign(numbers["size"], table, upscale=True)
    smaller = buckets.assign(numbers["size"], table) < 0
    counts = np.bincount(places, minlength=len(table))
    orphans = [
        {"key": mend(name), "reason": NO_PICTURE, "detail": "it belongs to no picture"}
        for name in getattr(source, "orphans", [])
    ]
    with_buckets = (
        each | {"bucket": list(table[bucket]), "smaller": bool(less)}
        for each, bucket, less in zip(_good(parts, len(kept)), places, smaller, strict=True)
    )
    _write_lines(folder / "pictures.jsonl", with_buckets)
    _write_lines(folder / "rejected.jsonl", bad + orphans)
    found = _figures(numbers, bad) | {
        "files_without_a_picture": len(orphans),
        "base": base,
        "buckets": {
            f"{height}x{width}": int(count)
            for (height, width), count in zip(table, counts, strict=True)
            if count
        },
        "smaller_than_bucket": int(smaller.sum()),
    }
    assert len(source) == found["read"]
    save_png(folder / "aspects.png", histogram(counts, table))
    if len(places):
        save_png(folder / "contact.png", _contact(source, numbers["index"]))
    write_json(folder / "report.json", found)
    return found


def _numbers(good: Sequence[Looked]) -> dict[str, np.ndarray]:
    letters = [each["letters"] for each in good]
    return {
        "index": np.array([each["index"] for each in good], np.int64),
        "size": np.array([each["size"] for each in good], np.int64).reshape(-1, 2),
        "bytes": np.array([each["bytes"] for each in good], np.int64),
        "captions": np.array([len(each) for each in letters], np.int64),
        "letters": np.array([n for each in letters for n in each], np.int64),
        "scored": np.array([each["scored"] for each in good], bool),
    }


def _figures(numbers: dict[str, np.ndarray], bad: Sequence[Looked]) -> dict[str, Any]:
    reasons = collections.Counter(each["reason"] for each in bad)
    height, width = numbers["size"].T
    captions = zip(*np.unique(numbers["captions"], return_counts=True), strict=True)
    return {
        "read": len(height) + len(bad),
        "used": len(height),
        "rejected": dict(sorted(reasons.items())),
        "captions_a_picture": {str(n): int(count) for n, count in captions},
        "with_scores": int(numbers["scored"].sum()),
        "height": _spread(height),
        "width": _spread(width),
        "megapixels": _spread(height * width / 1e6),
        "bytes": _spread(numbers["bytes"]),
        "letters_of_a_caption": _spread(numbers["letters"]),
    }


def _spread(values: np.ndarray) -> list[float] | None:
    """Returns the least value, the median and the largest."""
    if not len(values):
        return None
    return [round(float(value), 3) for value in np.quantile(values, [0, 0.5, 1])]


def _good(folder: Path, parts: int) -> Iterator[Looked]:
    """Yields what is written down of the pictures that can be used."""
    for number in range(parts):
        looked = json.loads(_part(folder, number).read_bytes())
        yield from (each for each in looked if "reason" not in each)


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.json"


def _parts(source: Source, folder: Path) -> Iterator[list[Looked]]:
    """Yields what is known of each part, which it reads unless that is written down."""
    counts = Counts()
    with thread_pool() as pool, Progress(len(source), "picture") as progress:
        for number, start in enumerate(range(0, len(source), PART)):
            path, indices = _part(folder, number), range(start, min(start + PART, len(source)))
            looked = _kept(path, len(indices))
            if looked is None:
                looked = []
                for each in pool.map(lambda index: _look(source, index), indices):
                    looked.append(each)
                    progress.update()
                write_json(path, looked)
            else:
                progress.update(len(looked))
            bad = [Rejection(x["key"], x["reason"], x["detail"]) for x in looked if "reason" in x]
            counts.add(0, bad)
            yield looked


def _kept(path: Path, records: int) -> list[Looked] | None:
    try:
        looked = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return looked if isinstance(looked, list) and len(looked) == records else None


def _look(source: Source, index: int) -> Looked:
    key = f"record {index}"
    try:
        record = source[index]
        key = record["key"]
        height, width = decode(record["image"]).shape[:2]
    except BadImage as error:
        key = mend(error.key or key)
        return {"key": key, "reason": error.reason, "detail": mend(str(error))}
    return {
        "index": index,
        "key": mend(key),
        "size": [height, width],
        "bytes": len(record["image"]),
        "letters": [len(caption) for caption in record["captions"]],
        "scored": bool(record["scores"]),
    }


def _write_lines(path: Path, values: Iterable[Looked]) -> None:
    """Writes lines of JSON, completely or not at all."""
    partial = path.with_name(path.name + ".part")
    with partial.open("w") as file:
        for value in values:
            file.write(json.dumps(value, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _contact(source: Source, indices: Sequence[int]) -> Picture:
    """Returns a sheet of pictures, evenly spread over the source, cropped to squares."""
    chosen = sorted({int(indices[i * len(indices) // SHOWN]) for i in range(SHOWN)})
    pictures = [
        cover_crop(decode(source[index]["image"]), SIDE, SIDE, upscale=True) for index in chosen
    ]
    return make_grid(in_rows(pictures, COLUMNS))


def histogram(counts: Sequence[int], table: Sequence[tuple[int, int]]) -> Picture:
    """Draws a bar for each bucket: its height x width, its aspect ratio, and its pictures."""
    line, label, most = 16, 150, 400
    image = Image.new("RGB", (label + most + 80, line * (len(table) + 1)), "white")
    draw = ImageDraw.Draw(image)
    draw.text((4, 2), "height x width, ratio: pictures", "black")
    for i, (count, size) in enumerate(zip(counts, table, strict=True), 1):
        top, length = i * line, round(most * int(count) / max(1, *map(int, counts)))
        draw.text((4, top + 2), f"{size[0]} x {size[1]}, {buckets.ratio(size):.2f}", "black")
        if count:
            draw.rectangle((label, top + 3, label + max(1, length), top + line - 3), "steelblue")
            draw.text((label + length + 6, top + 2), str(count), "black")
    return np.asarray(image)
