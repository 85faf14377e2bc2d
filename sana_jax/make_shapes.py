"""Makes the built-in data set `shapes`: captioned scenes, drawn from a seed.

    python -m sana_jax.make_shapes --data_dir=DIR                         # 128 px, 20,000 + 1,000
    python -m sana_jax.make_shapes --data_dir=DIR --size=256 --train=2000 --test=500
    python -m sana_jax.make_shapes --data_dir=DIR --preview=shapes.png    # and a sheet of pictures
    python -m sana_jax.make_shapes --novel=FOLDER                # 20 pictures with a new colour

Running the same command again changes nothing. DIR/shapes/SIZE/VERSION holds ArrayRecord files as
TFDS writes them; a run that was killed leaves a folder `incomplete.*` beside it, which is never
read. The functions `scene(seed, split)`, `draw(scene, height, width)` and `captions(scene)` of
sana_jax/shapes give the same scenes without files: record i has the seed (seed, i).

--novel writes another kind of data: a folder of twenty pictures with a caption in a .txt beside
each, all with a colour that shapes does not have, to fine-tune a model with. How well it has learnt
the colour measures python -m sana_jax.evaluate --task=shapes --novel.
"""

from absl import flags
from etils import epath

from sana_jax.runtime import cli
from sana_jax.runtime.errors import UserError
from sana_jax.shapes import novel
from sana_jax.shapes.dataset import open_split, prepare, preview

if __name__ == "__main__":  # commands that read this data set have such flags too
    _DATA_DIR = flags.DEFINE_string("data_dir", None, "folder to write the data set into")
    _SIZE = flags.DEFINE_integer("size", 128, "side of the pictures in pixels", 16, 8192)
    _TRAIN = flags.DEFINE_integer("train", 20_000, "pictures to train with", 1)
    _TEST = flags.DEFINE_integer(
        "test", 1_000, "pictures to test with, of combinations that are not in training", 1
    )
    _SEED = flags.DEFINE_integer("seed", 0, "seed of all scenes", 0, 2**32 - 1)
    _PREVIEW = flags.DEFINE_string(
        "preview", None, "a PNG to write, with pictures and their captions"
    )
    _NOVEL = flags.DEFINE_string(
        "novel", None, "folder to write the pictures with the new colour into, new or empty"
    )


def main(argv):
    del argv
    if _NOVEL.value is not None:
        for name in ("data_dir", "train", "test", "seed", "preview"):
            if flags.FLAGS[name].present:
                raise UserError(f"--{name} is not for --novel; leave one of them out")
        novel.write_lessons(_NOVEL.value, _SIZE.value)
        print(f"{_NOVEL.value}: {novel.PICTURES} pictures with {novel.NAME}, and their captions")
        return
    if _DATA_DIR.value is None:
        raise UserError("--data_dir is missing; --help says what it takes")
    if _PREVIEW.value and not epath.Path(_PREVIEW.value).parent.is_dir():
        raise UserError(f"--preview={_PREVIEW.value}: there is no such folder; name another")
    folder = prepare(_DATA_DIR.value, _SIZE.value, _TRAIN.value, _TEST.value, _SEED.value)
    for split in ("train", "test"):
        print(f"{folder}: {split}, {len(open_split(_DATA_DIR.value, split, _SIZE.value))} records")
    if _PREVIEW.value:
        splits = [open_split(_DATA_DIR.value, split, _SIZE.value) for split in ("train", "test")]
        sheet = preview([split[i] for split in splits for i in range(min(8, len(split)))])
        sheet.save(_PREVIEW.value, "PNG")


if __name__ == "__main__":
    cli.run(main)
