"""A prepared TFDS data set as a source: its features are matched to a record's by their names.

Read without TensorFlow, from files with random access (ArrayRecord). Images stay encoded.
"""

import difflib
import re
from typing import Any

from etils import epath

from sana_jax.data.records import NoData
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import check_readable

# What features are called, most telling first.
IMAGE_NAMES = ("image", "img", "picture", "jpg", "png")
CAPTION_NAMES = ("captions", "caption", "text", "prompt", "description", "label")
KEY_NAMES = ("key", "id", "image_id", "image/id", "file_name", "image/filename", "filename")


class TFDSSource:
    """The records of `tfds:NAME[/CONFIG][:VERSION]`.

    Captions may be one text, a list of texts, a list of {"text": ...}, or a class label, whose
    name becomes the caption. Raises UserError for a data set that is unknown or not prepared here,
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
        features = builder.info.features
        self._image = _image_name(tfds, spec, features)
        self._captions = next((name for name in CAPTION_NAMES if name in features), None)
        self._key = next((name for name in KEY_NAMES if name in features), None)
        label = features[self._captions] if self._captions else None
        self._label = label if isinstance(label, tfds.features.ClassLabel) else None
        try:
            skip = {self._image: tfds.decode.SkipDecoding()}
            self._data = builder.as_data_source(split, decoders=skip)
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"tfds:{spec}: {' '.join(str(error).split())}") from None
        self._about = epath.Path(builder.data_dir) / "dataset_info.json"
        # What a fingerprint starts from.
        self.name = f"{builder.info.full_name} {split} {splits[split].num_bytes}"

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict:
        try:
            row = self._data[index]
        except RuntimeError:  # ArrayRecord's, for damage and for a storage that is away
            check_readable(self._about)
            raise
        captions = row[self._captions] if self._captions else []
        return {
            "key": str(_text(row[self._key])) if self._key else f"{index:08d}",
            "image": row[self._image],
            "captions": [self._label.int2str(captions)] if self._label else _texts(captions),
            "scores": [float(score) for score in row.get("scores", ())],
            "truth": str(_text(row.get("truth", ""))),
        }


def _builder(tfds, spec: str, data_dir: str | None):
    try:
        return tfds.builder(spec, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError:
        name = re.split("[/:]", spec)[0]
        close = difflib.get_close_matches(
            name, tfds.list_builders(with_community_datasets=False), n=3
        )
        hint = f"did you mean {' or '.join(close)}?" if close else "see tfds.list_builders()"
        raise NoData(f"tfds:{spec}: TFDS has no data set {name!r}; {hint}") from None
    except (ValueError, AssertionError) as error:  # a config or a version that it does not have
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


def _texts(captions: Any) -> list[str]:
    if isinstance(captions, dict):  # a sequence of dicts arrives as a dict of sequences
        captions = captions.get("text", [])
    if isinstance(captions, str | bytes):
        captions = [captions]
    texts = [str(_text(caption)).strip() for caption in captions]
    return [text for text in texts if text]
