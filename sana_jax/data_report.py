"""Says what a data set is: counts, sizes, aspect ratios, captions, and what cannot be used and why.

    python -m sana_jax.data_report SOURCE --out=DIR
    python -m sana_jax.data_report 'webdataset:DATA/{000..012}.tar' --out=DIR --buckets=512
    python -m sana_jax.data_report parquet:DATA --out=DIR --split=test

SOURCE is any data set with pictures by its name (sana_jax/data/README.md), such as tfds:NAME.
Every picture is decoded, as a training would. DIR gets report.json, pictures.jsonl (size, bucket
and captions of each), rejected.jsonl (key, reason and detail of each that cannot be used; the key
of a picture in an archive begins with the archive's name), aspects.png (a bar for each bucket) and
contact.png. The last line is JSON: read = used + the sum of rejected.

The same command goes on where it was stopped. Archives that are cut short, lists of shards that are
not there and names that stand twice are told in one line, and nothing is written.
"""

import json

from absl import flags

from sana_jax.runtime import cli
from sana_jax.runtime.errors import UserError

OPERANDS = "SOURCE"
_OUT = flags.DEFINE_string("out", None, "folder to write, made if missing", required=True)
_SPLIT = flags.DEFINE_string("split", "train", "split of the data")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "folder where shapes or TFDS data were prepared")
_BUCKETS = flags.DEFINE_enum(
    "buckets", "1024", ["512", "1024", "2048", "4096"], "pixels: the published sizes to sort by"
)
_SIZE = flags.DEFINE_integer("size", 128, "pixels, of the data set shapes", 16, 2**13)


def main(argv):
    _, data = argv
    from pathlib import Path

    from sana_jax.data.begun import SETTINGS
    from sana_jax.data.report import report
    from sana_jax.data.sources import is_stored, open_source
    from sana_jax.runtime.files import local, reason_of, storage
    from sana_jax.runtime.lock import locked

    folder = local(Path(_OUT.value))
    if is_stored(data):
        raise UserError(f"{data}: these are latents already; give pictures")
    given = data, _SPLIT.value, _DATA_DIR.value, _SIZE.value
    source = open_source(*given, resumes=(folder / SETTINGS).exists())
    settings = {"data": data, "split": _SPLIT.value, "source": source.fingerprint}
    settings |= {"records": len(source), "base": int(_BUCKETS.value)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder), storage(folder):
            found = report(source, folder, settings, int(_BUCKETS.value))
    except OSError as error:
        raise UserError(f"--out={folder}: {reason_of(error)}") from None
    width = max(map(len, found))
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {count}" for key, count in value.items()) or "none"
        elif isinstance(value, list):
            value = "{:.10g} (least), {:.10g} (median), {:.10g} (most)".format(*value)
        print(f"{name.replace('_', ' '):{width}}  {value}")
    print(json.dumps(found))


if __name__ == "__main__":
    cli.run(main, operands=OPERANDS)
