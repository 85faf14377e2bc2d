"""Trains a small tokenizer on captions. As with Gemma's, `<bos>` comes first and nothing last.

    python -m sana_jax.train_tokenizer --out=DIR                    # on the built-in data set
    python -m sana_jax.train_tokenizer --out=DIR --data=PHOTOS --vocab_size=8192

It reads the captions of the first records. For shapes no pictures are drawn.
"""

from collections.abc import Iterable

from absl import flags

from sana_jax.data.images import BadImage
from sana_jax.runtime import cli
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import check_new, new_folder
from sana_jax.text.tokenizers import SMALLEST, train_tokenizer

if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", None, "folder to write, new or empty", required=True)
    _DATA = flags.DEFINE_string("data", "shapes", "shapes, a folder of images, or tfds:NAME")
    _DATA_DIR = flags.DEFINE_string(
        "data_dir", None, "folder where TFDS data were prepared; default: TFDS' own"
    )
    _SPLIT = flags.DEFINE_string("split", "train", "split of the data")
    _VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 1024, "the largest number of tokens", SMALLEST)
    _RECORDS = flags.DEFINE_integer(
        "records", 10_000, "the largest number of records whose captions are read", 1
    )


def main(argv: list[str]) -> None:
    del argv
    out = check_new(_OUT.value)
    found = _captions()
    with new_folder(out):
        tokenizer = train_tokenizer(found, _VOCAB_SIZE.value, out)
    print(f"{out}: {len(tokenizer)} tokens")


def _captions() -> Iterable[str]:
    """Returns the captions of the records that the flags name. Raises UserError without any."""
    if _DATA.value == "shapes":
        from sana_jax.shapes.captions import captions
        from sana_jax.shapes.scene import scene

        scenes = (scene((0, index), _SPLIT.value) for index in range(_RECORDS.value))
        return (said.text for drawn in scenes for said in captions(drawn))
    from sana_jax.data.sources import open_source

    source = open_source(_DATA.value, _SPLIT.value, _DATA_DIR.value)
    count = min(len(source), _RECORDS.value)
    found = [text for index in range(count) for text in _read(source, index)]
    if not found:
        raise UserError(f"--data={_DATA.value}: the first {count} records have no captions")
    return found


def _read(source, index: int) -> list[str]:
    """Returns the captions of a record, none if it is bad."""
    try:
        return source[index]["captions"]
    except BadImage:
        return []


if __name__ == "__main__":
    cli.run(main)
