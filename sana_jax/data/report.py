"""Looks at every picture of a source, and writes down what the data set is.

report.json      counts, sizes, captions, and the pictures of each bucket
pictures.jsonl   every picture that can be used: key, size, bucket, captions
rejected.jsonl   every one that cannot, and each file without a picture: key, reason, detail
aspects.png      a histogram of the aspect ratios, by bucket
contact.png      some of the pictures
parts/           what is known of each part of the source, which a second run does not read again
"""

import collections
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, ImageDraw

from sana_jax.data.begun import begun, write_json
from sana_jax.data.images import BadImage, cover_crop, decode
from sana_jax.data.records import Source, thread_pool
from sana_jax.data.rejections import Counts, Rejection
from sana_jax.models import buckets
from sana_jax.pictures import Picture, in_rows, make_grid, save_png
from sana_jax.runtime.files import write_atomically
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
    (folder / "parts").mkdir(exist_ok=True)
    looked = list(itertools.chain.from_iterable(_parts(source, folder / "parts")))
    good = [each for each in looked if "reason" not in each]
    bad = [each for each in looked if "reason" in each]
    table = buckets.training_buckets(base)
    sizes = np.array([each["size"] for each in good], np.int64).reshape(-1, 2)
    places = buckets.assign(sizes, table, upscale=True)
    fits = buckets.assign(sizes, table) >= 0
    for each, bucket, whole in zip(good, places, fits, strict=True):
        each["bucket"] = list(table[bucket])
        each["smaller"] = not whole
    bad += [
        {"key": mend(name), "reason": NO_PICTURE, "detail": "it belongs to no picture"}
        for name in getattr(source, "orphans", [])
    ]
    _write_lines(folder / "pictures.jsonl", good)
    _write_lines(folder / "rejected.jsonl", bad)
    found = _figures(good, bad, len(source)) | {
        "base": base,
        "buckets": {
            f"{height}x{width}": int((places == i).sum())
            for i, (height, width) in enumerate(table)
            if (places == i).any()
        },
        "smaller_than_bucket": int((~fits).sum()),
    }
    save_png(folder / "aspects.png", histogram(np.bincount(places, minlength=len(table)), table))
    if good:
        save_png(folder / "contact.png", _contact(source, [each["index"] for each in good]))
    write_json(folder / "report.json", found)
    return found


def _figures(good: Sequence[Looked], bad: Sequence[Looked], records: int) -> dict[str, Any]:
    reasons = collections.Counter(each["reason"] for each in bad)
    orphans = reasons.pop(NO_PICTURE, 0)
    assert records == len(good) + sum(reasons.values())
    sides = {"height": [each["size"][0] for each in good]}
    sides["width"] = [each["size"][1] for each in good]
    sides["megapixels"] = [each["size"][0] * each["size"][1] / 1e6 for each in good]
    sides["bytes"] = [each["bytes"] for each in good]
    sides["letters_of_a_caption"] = [n for each in good for n in each["letters"]]
    captions = collections.Counter(len(each["letters"]) for each in good)
    return {
        "read": records,
        "used": len(good),
        "rejected": dict(sorted(reasons.items())),
        "files_without_a_picture": orphans,
        "captions_a_picture": {str(n): captions[n] for n in sorted(captions)},
        "with_scores": sum(each["scored"] for each in good),
        **{name: _spread(values) for name, values in sides.items()},
    }


def _spread(values: Sequence[float]) -> list[float] | None:
    """Returns the least value, the median and the largest."""
    if not values:
        return None
    return [round(float(value), 3) for value in np.quantile(values, [0, 0.5, 1])]


def _parts(source: Source, folder: Path) -> Iterator[list[Looked]]:
    """Yields what is known of each part, which it reads unless that is written down."""
    counts = Counts()
    with thread_pool() as pool, Progress(len(source), "picture") as progress:
        for number, start in enumerate(range(0, len(source), PART)):
            path, indices = folder / f"{number:06d}.json", range(start, start + PART)
            indices = range(start, min(indices.stop, len(source)))
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


def _write_lines(path: Path, values: Sequence[Any]) -> None:
    text = "".join(json.dumps(value, sort_keys=True) + "\n" for value in values)
    write_atomically(epath.Path(path), text.encode())


def _contact(source: Source, indices: Sequence[int]) -> Picture:
    """Returns a sheet of pictures, evenly spread over the source, cropped to squares."""
    chosen = sorted({indices[i * len(indices) // SHOWN] for i in range(SHOWN)})
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
