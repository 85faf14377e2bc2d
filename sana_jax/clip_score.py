"""Scores every caption of a data set by CLIP, for training to choose the better ones.

    python -m sana_jax.clip_score SOURCE --out=SCORED --weights=CLIP_FOLDER
    python -m sana_jax.train --config=... --config.data.source=captioned:SCORED \\
        --config.data.captions.kind=score

SOURCE is any data set with captions by its name (sana_jax/data/README.md), such as the
captioned:CAPTIONS that `caption` writes.
A score is 100 x the cosine of picture and caption in CLIP's space. CLIP_FOLDER is a download of
openai/clip-vit-large-patch14, which SANA uses, of openai/clip-vit-base-patch32, or of one of
OpenCLIP's ViT models: as transformers writes them, or with OpenCLIP's own files.

SCORED is then a data set by the name captioned:SCORED, as `caption` writes one: the same pictures
and captions, with scores. Pictures that cannot be read, have no caption, or have none with
--drop_below points are left out, counted by reason in SCORED/index.json, and named in the log. The
same command continues where it was stopped and ends with the same bytes.

The last line is a JSON object: pictures read, used and rejected, captions, and their mean score.
"""

import json

from absl import flags

from sana_jax.runtime import cli
from sana_jax.runtime.errors import UserError

OPERANDS = "SOURCE"
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "folder where shapes or TFDS data were prepared; needed for shapes"
)
_SPLIT = flags.DEFINE_string("split", "train", "split of the data")
_OUT = flags.DEFINE_string("out", None, "folder to write, made if missing", required=True)
_WEIGHTS = flags.DEFINE_string("weights", None, "a folder with CLIP", required=True)
_DROP = flags.DEFINE_float(
    "drop_below", 0.0, "points; leave out pictures whose best caption has fewer", 0.0, 100.0
)
_BATCH = flags.DEFINE_integer(
    "batch_size",
    64,
    "pictures at once; rounded up to a multiple of the number of devices",
    1,
    2**16,
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "dtype that the network computes in"
)
_FSDP = flags.DEFINE_integer("fsdp", 1, "devices that share the weights", 1)


def main(argv):
    _, data = argv
    from sana_jax import sharding
    from sana_jax.checkpoints.clip import open_clip
    from sana_jax.data.begun import SETTINGS
    from sana_jax.data.labelling.labels import source_settings
    from sana_jax.data.labelling.score import Scorer
    from sana_jax.data.sources import is_stored, open_source
    from sana_jax.runtime import devices
    from sana_jax.runtime.files import local, reason_of, storage
    from sana_jax.runtime.lock import locked

    folder = local(_OUT.value)
    if is_stored(data):
        raise UserError(f"{data}: these are latents; give the pictures they are of")
    mesh = sharding.make_mesh(fsdp=_FSDP.value)
    opened = open_clip(_WEIGHTS.value)
    scorer = Scorer(opened, mesh, _DTYPE.value, _BATCH.value, _DROP.value)
    given = data, _SPLIT.value, _DATA_DIR.value, 128
    source = open_source(*given, resumes=(folder / SETTINGS).exists())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            locked(folder),
            storage(folder),  # from here on the same command continues
            devices.memory_errors("a smaller --batch_size, or --dtype=bfloat16"),
        ):
            index = scorer.run(source, folder, source_settings(source, *given))
    except OSError as error:
        raise UserError(f"--out={folder}: {reason_of(error)}") from None
    counts, captions = index["counts"], index["scored_captions"]
    rejected = {reason: count for reason, count in counts["rejected"].items() if count}
    told = {"read": counts["read"], "used": counts["used"], "rejected": rejected}
    mean = round(index["sum_of_scores"] / captions, 4)
    print(f"{folder}: read it by the name captioned:{folder}")
    print(json.dumps(told | {"captions": captions, "mean_score": mean}))


if __name__ == "__main__":
    cli.run(main, operands=OPERANDS)
