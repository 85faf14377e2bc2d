"""The data set `shapes` on disk: written once below a folder, as TFDS does, then read by number."""

import contextlib
import io
import re
import tempfile
import textwrap

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from sana_jax.data.shards import check_shards, damage_named, damaged
from sana_jax.runtime.errors import Retry, UserError
from sana_jax.runtime.files import check_readable, reason_of, unwritten

REMEDY = "delete that folder, and make it again"


def prepare(
    data_dir: epath.PathLike,
    size: int | tuple[int, int] = 128,
    train: int = 20_000,
    test: int = 1_000,
    seed: int = 0,
) -> epath.Path:
    """Writes the data set below `data_dir`, unless it exists, and returns its folder.

    Args:
      size: pixels, a side or (height, width).
      train, test: the number of records of each split.

    Raises UserError if the data set exists with other counts or another seed, or if nothing can be
    written there, and Retry if the disk is full.
    """
    import tensorflow_datasets as tfds

    from sana_jax.shapes.builder import Shapes, ShapesConfig, config_name

    height, width = _height_width(size)
    if min(train, test) < 1:
        raise UserError(f"train={train}, test={test}: a split has one record at least")
    name = config_name(height, width)
    config = (
        name
        if name in Shapes.builder_configs
        else ShapesConfig(name=name, height=height, width=width)
    )
    try:
        epath.Path(data_dir).mkdir(parents=True, exist_ok=True)
        with damage_named(epath.Path(data_dir) / "shapes" / name, REMEDY):
            builder = Shapes(data_dir=data_dir, config=config, train=train, test=test, seed=seed)
            there = dict(builder.info.metadata or {})
    except OSError as error:
        raise UserError(f"data_dir {data_dir}: {reason_of(error)}; name another") from None
    if builder.data_path.exists():
        if there != builder.settings:
            raise UserError(
                f"{builder.data_path} holds {_settings(there)}, not {_settings(builder.settings)};"
                " name another data_dir, or delete that folder"
            )
        return builder.data_path
    tfds.disable_progress_bar()  # the builder's own knows the total
    try:
        with tempfile.TemporaryDirectory() as nothing, contextlib.redirect_stdout(None):
            builder.download_and_prepare(download_dir=nothing)  # TFDS would print of downloads
    except OSError as error:
        raise unwritten(f"{builder.data_path} was not written", error) from error
    except RuntimeError as error:  # ArrayRecord's own threads write, and it raises this
        if not re.search("No space left|quota", str(error)):
            raise
        raise Retry(f"{builder.data_path} was not written: {error}") from error
    return builder.data_path


def _settings(values: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(values.items()))


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


class Records:
    """A split, read by number; record i is a dict of

    key (str), image (bytes of a PNG), captions (list of str), scores (list of float) and truth
    (str, JSON: `scene.truth`, and `captions`: each one's style, errors and facts).
    """

    def __init__(self, source, folder: epath.Path):
        self._source, self._folder = source, folder

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            record = self._source[index]
        except (RuntimeError, ValueError) as error:  # of damage, or of a storage that is away
            check_readable(self._folder / "dataset_info.json")
            raise damaged(self._folder, error, REMEDY) from error
        return {
            "key": record["key"].decode(),
            "image": record["image"],
            "captions": [caption.decode() for caption in record["captions"]],
            "scores": [round(float(score), 2) for score in record["scores"]],
            "truth": record["truth"].decode(),
        }


def open_split(
    data_dir: epath.PathLike, split: str = "train", size: int | tuple[int, int] = 128
) -> Records:
    """Opens a prepared split. Raises UserError if it was not prepared."""
    import tensorflow_datasets as tfds

    from sana_jax.shapes.builder import Shapes, config_name

    height, width = _height_width(size)
    name = config_name(height, width)
    if data_dir is None:
        raise UserError("the data set shapes needs data_dir, the folder it was prepared in")
    folder = epath.Path(data_dir) / "shapes" / name / str(Shapes.VERSION)
    if not folder.exists():
        command = f"python -m sana_jax.make_shapes --data_dir={data_dir} --size={height}"
        raise UserError(f"{folder} is not there; make it with {command}")
    with damage_named(folder, REMEDY):
        builder = tfds.builder_from_directory(folder)
        if split not in builder.info.splits:
            has = ", ".join(builder.info.splits)
            raise UserError(f"shapes has no split {split!r}; it has {has}")
        parts = builder.info.splits[split].file_instructions
        check_shards([(part.filename, part.examples_in_shard) for part in parts], REMEDY)
        skip = {"image": tfds.decode.SkipDecoding()}
        return Records(builder.as_data_source(split, decoders=skip), folder)


def preview(records: list[dict], width: int = 900) -> Image.Image:
    """Draws a sheet: each picture beside its captions and their scores."""
    font = ImageFont.load_default(13)
    rows = []
    for record in records:
        picture = Image.open(io.BytesIO(record["image"]))
        lines = [
            line
            for caption, score in zip(record["captions"], record["scores"], strict=True)
            for line in textwrap.wrap(f"{score:.1f}  {caption}", 110, subsequent_indent=" " * 8)
        ]
        height = max(picture.height, 20 * len(lines)) + 8
        row = Image.new("RGB", (picture.width + width, height), "white")
        row.paste(picture, (4, 4))
        ImageDraw.Draw(row).text((picture.width + 16, 4), "\n".join(lines), "black", font)
        rows.append(np.asarray(row))
    return Image.fromarray(np.concatenate(rows))
