"""Opens a source of records: `shapes`, a folder of images, a TFDS data set, or stored latents.

A source is a random-access sequence of records (`Record`): `len(source)`, `source[i]`, and
`source.fingerprint`, a short text that changes when the files do. `source[i]` raises BadImage
if one record cannot be read, Retry if the storage is away; it may be called from threads.
"""

from etils import epath

from sana_jax.data.folder import Folder
from sana_jax.data.records import Fingerprinted, Source
from sana_jax.data.tfds_source import TFDSSource
from sana_jax.runtime.errors import UserError


def open_source(
    spec: str,
    split: str = "train",
    data_dir: str | None = None,
    size: int = 128,
) -> Source:
    """Opens `spec`, one of

    - `shapes`: the built-in data set at `size` pixels, prepared under `data_dir` before;
    - `tfds:NAME[/CONFIG][:VERSION]`: a prepared TFDS data set under `data_dir`;
    - `precomputed:DIR`: latents of that split that `python -m sana_jax.precompute` wrote to DIR or
      to DIR/split;
    - anything else: a folder of images. Its subfolder `split` is read if there is one; otherwise
      the whole folder is the split `train`.

    Raises UserError if there is no such folder, data set or split, or nothing in it.
    """
    if spec == "shapes":
        from sana_jax.shapes.dataset import (
            open_split,  # what draws is not needed to read other sources
        )

        return Fingerprinted(open_split(data_dir, split, size), f"shapes {split} {size}")
    if spec.startswith("tfds:"):
        source = TFDSSource(spec.removeprefix("tfds:"), split, data_dir)
        return Fingerprinted(source, source.name)
    if spec.startswith("precomputed:"):
        from sana_jax.data.precomputed import Precomputed

        return Precomputed(spec.removeprefix("precomputed:"), split)
    folder = Folder(_folder_of(spec, split))
    return Fingerprinted(folder, folder.listing)


def _folder_of(spec: str, split: str) -> epath.Path:
    root = epath.Path(spec).expanduser()
    if not root.is_dir():
        known = "shapes, tfds:NAME, precomputed:DIR or a folder of images"
        raise UserError(f"{spec}: there is no such folder; the data is {known}")
    if (root / split).is_dir():
        return root / split
    inside = sorted(path.name for path in root.iterdir() if path.is_dir())
    if split == "train" and not {"test", "validation", "val"} & set(inside):
        return root
    there = f"there are {', '.join(inside[:10])}" if inside else "it has no subfolders"
    raise UserError(
        f"{spec}: no split {split!r}, which would be a subfolder; {there}."
        " Make one, or name another split (a folder without subfolders is the split train)"
    )
