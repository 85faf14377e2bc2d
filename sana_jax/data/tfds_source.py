"""A prepared TFDS data set as a source: its features are matched to a record's by their names.

Read without TensorFlow, from files with random access (ArrayRecord). Images stay encoded.
"""

import difflib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from sana_jax.data.images import BadImage
from sana_jax.data.records import NoData, captioned
from sana_jax.data.shards import ABOUT, check_about, check_shards, damage_named
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import check_readable

REMEDY = "delete that data set's folder and prepare it anew"

# What features are called, most telling first.
IMAGE_NAMES = ("image", "img", "picture", "jpg", "png")
CAPTION_NAMES = ("captions", "caption", "text", "prompt", "description", "label")
KEY_NAMES = ("key", "id", "image_id", "image/id", "file_name", "image/filename", "filename")


class TFDSSource:
    """The records of `tfds:NAME[/CONFIG][:VERSION]`.

    Captions may be one text, a list of texts, a list of {"text": ...}, or class labels, whose names
    become captions. Raises UserError for a data set that is unknown or not prepared here,
    for a split that it lacks, and for features without an image.
    """

    def __init__(self, spec: str, split: str, data_dir: str | None = None):
        import tensorflow_datasets as tfds  # takes seconds

        builder = _builder(tfds, spec, data_dir)
        splits = builder.info.splits
        if not splits:
            raise NoData(
                f"tfds:{spec} is not prepared in {builder.data_dir}; run python -c 'import"
                f' tensorflow_datasets as tfds; tfds.builder("{spec}").download_and_prepare('
                'file_format="array_record")\', or give its data_dir'
            )
        if split.partition("[")[0] not in splits:
            raise UserError(f"tfds:{spec}: no split {split!r}; there are {', '.join(splits)}")
        folder = epath.Path(builder.data_dir)
        with damage_named(folder, REMEDY):
            features = builder.info.features
            self._image = _image_name(tfds, spec, features)
            readers = {
                name: _reader(tfds, features[name]) for name in CAPTION_NAMES if name in features
            }
        self._captions, self._read = next(
            ((name, read) for name, read in readers.items() if read), ("", None)
        )
        self._key = next((name for name in KEY_NAMES if name in features), None)
        try:
            skip = {self._image: tfds.decode.SkipDecoding()}
            self._data = builder.as_data_source(split, decoders=skip)
            chosen = splits[split]
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"tfds:{spec}: {' '.join(str(error).split())}") from None
        self._about = folder / ABOUT[0]
        # What a fingerprint starts from.
        self.name = f"{builder.info.full_name} {split} {chosen.num_bytes}"
        self.places = [
            (
                part.filename,
                part.skip,
                part.examples_in_shard if part.take < 0 else part.skip + part.take,
            )
            for part in chosen.file_instructions
        ]
        check_shards([(file, end) for file, _, end in self.places], REMEDY)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict:
        key = ""
        try:
            row = self._data[index]
            key = str(_text(row[self._key])) if self._key else f"{index:08d}"
            image = row[self._image]
            if not isinstance(image, bytes):
                raise BadImage("unreadable", "it has no image")
            scores = [float(score) for score in np.ravel(row.get("scores", ()))]
            captions = self._read(row[self._captions]) if self._read else []
            texts = captioned(captions, scores, str(_text(row.get("truth", ""))))
        except BadImage as error:
            error.key = key
            raise
        except MemoryError:
            raise
        except (
            Exception
        ) as error:  # ArrayRecord's and TFDS', for damage and where a storage is away
            check_readable(self._about)
            bad = BadImage("unreadable", f"{type(error).__name__}: {error}")
            bad.key = key
            raise bad from None
        return {"key": key, "image": image, **texts}

    def key_of(self, index: int) -> str:
        """Returns the file that a record is in and its number there."""
        for file, first, end in self.places:
            if index < end - first:
                return f"{epath.Path(file).name} record {first + index}"
            index -= end - first
        raise IndexError(index)


def _builder(tfds, spec: str, data_dir: str | None):
    name = re.split("[/:]", spec)[0]
    try:
        return tfds.builder(spec, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError:
        close = difflib.get_close_matches(
            name, tfds.list_builders(with_community_datasets=False), n=3
        )
        hint = f"did you mean {' or '.join(close)}?" if close else "see tfds.list_builders()"
        raise NoData(f"tfds:{spec}: TFDS has no data set {name!r}; {hint}") from None
    except OSError:
        raise
    except Exception as error:  # also for a config or a version that it does not have
        root = epath.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
        check_about(root / name, REMEDY)
        raise UserError(f"tfds:{spec}: {' '.join(str(error).split())}") from None


def _image_name(tfds, spec: str, features) -> str:
    images = [name for name, kind in features.items() if isinstance(kind, tfds.features.Image)]
    for name in (*IMAGE_NAMES, *images):
        if name in images:
            return name
    raise UserError(f"tfds:{spec}: no image among its features {', '.join(features)}")


def _text(value: Any) -> Any:
    """Decodes a text, which TFDS gives as bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _reader(tfds, feature) -> Callable[[Any], list[str]] | None:
    """Returns what makes captions of a feature's values; None for numbers, which are no captions.

    A label becomes its name; an unlabelled record, whose label is negative, has an empty caption.
    """
    inner = getattr(feature, "feature", None)  # of a sequence, which arrives as a list
    if hasattr(feature, "items"):
        readers = {name: _reader(tfds, feature[name]) for name in CAPTION_NAMES if name in feature}
        name, read = next(((n, r) for n, r in readers.items() if r), ("", None))
        return read and (lambda values: read(values[name]))
    if inner is not None:
        return _reader(tfds, inner)  # a sequence of dicts arrives as a dict of sequences
    if isinstance(feature, tfds.features.ClassLabel):
        return lambda labels: [feature.int2str(int(i)) if i >= 0 else "" for i in np.ravel(labels)]
    if np.dtype(feature.np_dtype) == object:
        return lambda texts: [str(_text(text)) for text in np.ravel(np.asarray(texts, object))]
    return None
