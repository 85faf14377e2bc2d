"""Encodes a data set once, so that training reads latents instead of images.

    python -m sana_jax.precompute --checkpoint=DIR_OR_HUB_ID --data=PHOTOS --out=DIR --size=512
    python -m sana_jax.precompute --checkpoint=... --data=PHOTOS --out=DIR --buckets=1024 --text

DIR is then a data set by the name precomputed:DIR; write each of several splits to its own
DIR/SPLIT. Every image is resized to cover --size, or the published size of the nearest aspect ratio
at --buckets, and cropped once and for all: --crop=random draws from (--seed, the image's number).
With --text the embedding of every caption is stored too, as sampling computes it: after the
instruction of the checkpoint, if it has one.

Large images take much memory, one of 4096 px 18 GB with the published autoencoder. --tile=auto
encodes those above 2048 x 2048 pixels in tiles. A tiny autoencoder took 0.84 GB for an image of
2048 px and 0.26 GB for it in tiles of 256 (--tile=256,224), beside 0.40 GB for the program itself.

Images that cannot be used are left out, counted by reason in DIR/index.json, and named in the log.
The same command continues where it was stopped, wherever the data is now; complete shards are kept.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from absl import flags

from sana_jax.checkpoints import flags as checkpoint_flags
from sana_jax.runtime import cli
from sana_jax.runtime.errors import UserError

_CHECKPOINT = checkpoint_flags.define("checkpoint")
_DATA = flags.DEFINE_string(
    "data",
    None,
    "shapes, a folder of images, webdataset:TARS, parquet:FILES or tfds:NAME[/CONFIG][:VERSION]",
    required=True,
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "folder where shapes or TFDS data were prepared; needed for shapes"
)
_SPLIT = flags.DEFINE_string("split", "train", "split of the data")
_OUT = flags.DEFINE_string("out", None, "folder to write, made if missing", required=True)
_SIZE = flags.DEFINE_integer("size", None, "side in pixels, or give --buckets", 16, 2**13)
_BUCKETS = flags.DEFINE_integer(
    "buckets", None, "instead of --size: the published sizes at 512, 1024, 2048 or 4096 px"
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
_VARIANT = checkpoint_flags.define("variant")
_REVISION = checkpoint_flags.define("revision")


def image_transform():
    """Returns the transform of a record's picture that --size or --buckets asks for."""
    from sana_jax.data.transforms import BucketTransform, ImageTransform
    from sana_jax.models import buckets

    options = dict(crop=_CROP.value, upscale=_UPSCALE.value, dtype="uint8")
    options |= dict(max_pixels=_MAX_PIXELS.value)
    if _SIZE.value is not None:
        return ImageTransform(_SIZE.value, _SIZE.value, **options)
    return BucketTransform(buckets.training_buckets(_BUCKETS.value), **options)


def tile_of(factor: int) -> tuple[int, int] | None:
    """Returns the size and stride of tiles that --tile asks for. Raises UserError."""
    from sana_jax.models import buckets
    from sana_jax.pipeline.request import tiles

    sizes = [(_SIZE.value,) * 2] if _SIZE.value else buckets.training_buckets(_BUCKETS.value)
    height, width = max(sizes, key=math.prod)
    try:
        given = _TILE.value if _TILE.value == "auto" else None
        if _TILE.value not in ("auto", "none"):
            given = tuple(map(int, _TILE.value.split(",")))
    except ValueError:
        raise UserError(f"--tile={_TILE.value}: give SIZE,STRIDE in pixels, auto or none") from None
    try:
        return tiles(factor, given, height, width)
    except UserError as error:
        raise UserError(f"--tile={_TILE.value}: {error}") from None


def open_encoders():
    """Returns the checkpoint with the networks that encode, and no others."""
    from sana_jax.checkpoints.load import open_checkpoint
    from sana_jax.runtime import checks

    checkpoint = open_checkpoint(
        _CHECKPOINT.value,
        variant=_VARIANT.value,
        revision=_REVISION.value,
        instruction_file=_INSTRUCTION.value,
        instruct=_TEXT.value and not _NO_INSTRUCTION.value,
    )
    if _SIZE.value is not None:
        checks.multiple(f"--size={_SIZE.value}", _SIZE.value, checkpoint.vae.factor)
    if _TEXT.value and checkpoint.text_encoder is None:
        raise UserError(f"{_CHECKPOINT.value} has no text encoder, which --text needs")
    text_encoder = checkpoint.text_encoder if _TEXT.value else None
    return dataclasses.replace(checkpoint, dit=None, text_encoder=text_encoder)


def settings_of(source, image, checkpoint, tokens, tile) -> dict[str, Any]:
    """Returns everything that decides the records; a folder is continued with the same alone."""
    from sana_jax.data import precomputed

    encoder = checkpoint.text_encoder
    return {
        "format": precomputed.FORMAT,
        "data": _DATA.value,
        "split": _SPLIT.value,
        "source": source.fingerprint,
        "records": len(source),
        "image": image.settings,
        "seed": _SEED.value,
        "autoencoder": precomputed.weights_sha256(checkpoint.vae, checkpoint.params["vae"]),
        "scaling_factor": checkpoint.vae.scaling_factor,
        "text": tokens and tokens.settings,
        "text_encoder": encoder
        and precomputed.weights_sha256(encoder, checkpoint.params["text_encoder"]),
        "dtype": _DTYPE.value,
        "store": _STORE.value,
        "batch": _BATCH.value,
        "shard": _SHARD.value,
    } | ({"tile": list(tile)} if tile else {})


def main(argv):
    del argv
    if (_SIZE.value is None) == (_BUCKETS.value is None):
        raise UserError("give --size or --buckets")

    import jax

    from sana_jax import sharding
    from sana_jax.checkpoints.load import place_all
    from sana_jax.data.begun import SETTINGS
    from sana_jax.data.encode import Encoder, WithTokens, precompute
    from sana_jax.data.sources import is_stored, open_source
    from sana_jax.data.text_image import CaptionTokens
    from sana_jax.runtime import devices
    from sana_jax.runtime.files import local, reason_of, storage
    from sana_jax.runtime.lock import locked

    folder = local(Path(_OUT.value))
    image = image_transform()
    if is_stored(_DATA.value):
        raise UserError(f"--data={_DATA.value}: these are latents already; give images")
    checkpoint = open_encoders()
    tile = tile_of(checkpoint.vae.factor)
    resumes = (folder / SETTINGS).exists()
    given = _DATA.value, _SPLIT.value, _DATA_DIR.value, _SIZE.value or 128
    source = open_source(*given, resumes=resumes)
    tokens = None
    if _TEXT.value:
        found = checkpoint.instruction
        tokens = CaptionTokens(checkpoint.tokenizer, checkpoint.text_rows, found and found.text)
    mesh = sharding.make_mesh()
    settings = settings_of(source, image, checkpoint, tokens, tile)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            locked(folder),
            storage(folder),  # from here on the same command continues
            jax.set_mesh(mesh),
            jax.default_matmul_precision("float32"),
            devices.memory_errors("a smaller --batch_size or --size, or --tile=1024,896"),
        ):
            place_all(checkpoint, _CHECKPOINT.value, _DTYPE.value, mesh)
            encoder = Encoder(checkpoint, mesh, _DTYPE.value, _BATCH.value, tokens, tile)
            index = precompute(source, WithTokens(image, tokens), encoder, folder, settings)
    except OSError as error:
        raise UserError(f"--out={folder}: {reason_of(error)}") from None
    counts = index["counts"]
    rejected = {reason: count for reason, count in counts["rejected"].items() if count}
    print(f"{folder}: read it by the name precomputed:{folder}")
    print(json.dumps({"read": counts["read"], "used": counts["used"], "rejected": rejected}))


if __name__ == "__main__":
    cli.run(main)
