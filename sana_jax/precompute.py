"""Encodes a data set once, so that training reads latents instead of images.

    python -m sana_jax.precompute --checkpoint=DIR_OR_HUB_ID --data=PHOTOS --out=DIR
    python -m sana_jax.precompute --checkpoint=... --data=PHOTOS --out=DIR --buckets=1024 --text

DIR is then a data set by the name precomputed:DIR; write each of several splits to its own
DIR/SPLIT. Every image is resized to cover the published size of the nearest aspect ratio, for the
size that the checkpoint draws or for --buckets, or to cover a square of --size; and cropped once
and for all: --crop=random draws from (--seed, the image's number). With --text the embedding of
every caption is stored too, as sampling computes it: after the instruction of the checkpoint, if it
has one.

Large images take much memory, one of 4096 px 18 GB with the published autoencoder. --tile=auto
encodes those above 2048 x 2048 pixels in tiles. A tiny autoencoder took 0.84 GB for an image of
2048 px and 0.26 GB for it in tiles of 256 (--tile=256,224), beside 0.40 GB for the program itself.

Images that cannot be used are left out, counted by reason in DIR/index.json, and named in the log.
The same command continues where it was stopped, wherever the data is now; complete shards are kept.

    python -m sana_jax.precompute ... --runner=DirectRunner

Shards are encoded by an Apache Beam pipeline, which needs pip install 'sana_jax[beam]', to the same
bytes on machines of the same kind. sana_jax/data/README.md has options for Dataflow and Flink.
"""

import json

from absl import flags

from sana_jax.checkpoints import flags as checkpoint_flags
from sana_jax.runtime import cli
from sana_jax.runtime.errors import UserError

_CHECKPOINT = checkpoint_flags.define("checkpoint")
_DATA = flags.DEFINE_string(
    "data",
    None,
    "shapes, a folder of images, webdataset:TARS, parquet:FILES, tfds:NAME[/CONFIG][:VERSION] or"
    " captioned:DIR",
    required=True,
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "folder where shapes or TFDS data were prepared; needed for shapes"
)
_SPLIT = flags.DEFINE_string("split", "train", "split of the data")
_OUT = flags.DEFINE_string("out", None, "folder to write, made if missing", required=True)
_SIZE = flags.DEFINE_integer(
    "size", None, "squares of this side in pixels, in place of --buckets", 16, 2**13
)
_BUCKETS = flags.DEFINE_integer(
    "buckets",
    None,
    "the published sizes at 512, 1024, 2048 or 4096 px; by default at what the checkpoint draws",
)
_CROP = flags.DEFINE_enum(
    "crop", "centre", ["centre", "random"], "the part of an image that is kept"
)
_SEED = flags.DEFINE_integer("seed", 0, "seed of random crops", 0, 2**32 - 1)
_UPSCALE = flags.DEFINE_bool(
    "upscale", False, "enlarge images that are too small, which are left out otherwise"
)
_TEXT = flags.DEFINE_bool("text", False, "also store the embeddings of the captions")
_INSTRUCTION = checkpoint_flags.define("instruction_file")
_NO_INSTRUCTION = flags.DEFINE_bool(
    "no_instruction", False, "encode the captions without an instruction"
)
_BATCH = flags.DEFINE_integer(
    "batch_size", 16, "images at once; rounded up to a multiple of the number of devices", 1, 2**16
)
flags.DEFINE_alias("batch", "batch_size")
_TILE = flags.DEFINE_string(
    "tile",
    "none",
    "encode larger images in tiles, which takes less memory: SIZE,STRIDE in pixels; auto: tiles"
    " above 2048 x 2048 pixels; or none. Latents differ a little from those of the whole image",
)
_MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels", 8192 * 8192, "of an image as it is found; larger ones are left out", 1
)
_SHARD = flags.DEFINE_integer("shard", 4096, "images of the data set per shard", 1)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "dtype that the networks compute in"
)
_STORE = flags.DEFINE_enum(
    "store", "bfloat16", ["float32", "bfloat16"], "dtype of the latents on disk"
)
_RUNNER = flags.DEFINE_string(
    "runner", None, "encode by an Apache Beam pipeline on this runner, such as DirectRunner"
)
_OPTIONS = flags.DEFINE_multi_string(
    "beam", [], "an option of Beam or of its runner, NAME=VALUE; may be given several times"
)
_VARIANT = checkpoint_flags.define("variant")
_REVISION = checkpoint_flags.define("revision")


def main(argv):
    del argv
    from sana_jax.data.begun import SETTINGS
    from sana_jax.data.encode import precompute
    from sana_jax.data.encoding import Encoding
    from sana_jax.runtime.files import local, reason_of, storage
    from sana_jax.runtime.lock import locked

    folder = local(_OUT.value)
    pipeline = None
    if _RUNNER.value is not None:
        from sana_jax.data.beam import open_pipeline, precompute_by_beam

        pipeline = open_pipeline(_RUNNER.value, _OPTIONS.value)
    elif _OPTIONS.value:
        raise UserError("--beam needs --runner, such as DirectRunner")
    encoding = Encoding(
        _CHECKPOINT.value,
        _DATA.value,
        _SPLIT.value,
        _DATA_DIR.value,
        size=_SIZE.value,
        buckets=_BUCKETS.value,
        crop=_CROP.value,
        seed=_SEED.value,
        upscale=_UPSCALE.value,
        max_pixels=_MAX_PIXELS.value,
        text=_TEXT.value,
        instruction_file=_INSTRUCTION.value,
        instruct=not _NO_INSTRUCTION.value,
        variant=_VARIANT.value,
        revision=_REVISION.value,
        batch=_BATCH.value,
        tile=_TILE.value,
        shard=_SHARD.value,
        dtype=_DTYPE.value,
        store=_STORE.value,
    )
    opened = encoding.open(resumes=(folder / SETTINGS).exists())
    settings = opened.settings()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder), storage(folder):  # from here on the same command continues
            if pipeline is None:
                with opened.computing():
                    given = opened.source, opened.transform, opened.encoder
                    index = precompute(*given, folder, settings)
            else:
                index = precompute_by_beam(encoding, folder, settings, pipeline)
    except OSError as error:
        raise UserError(f"--out={folder}: {reason_of(error)}") from None
    counts = index["counts"]
    rejected = {reason: count for reason, count in counts["rejected"].items() if count}
    print(f"{folder}: read it by the name precomputed:{folder}")
    print(json.dumps({"read": counts["read"], "used": counts["used"], "rejected": rejected}))


if __name__ == "__main__":
    cli.run(main)
