"""Opens a source of records: `shapes`, a folder of images, archives, TFDS, or stored latents.

A source is a random-access sequence of records (`Record`): `len(source)`, `source[i]`, and
`source.fingerprint`, a short text that changes when the files do. `source[i]` raises BadImage
if one record cannot be read, Retry if the storage is away; it may be called from threads.
"""

from etils import epath

from sana_jax.data.folder import Folder
from sana_jax.data.labelling.labels import Labelled
from sana_jax.data.records import Fingerprinted, NoData, Source
from sana_jax.data.tfds_source import TFDSSource
from sana_jax.runtime.errors import Retry, UserError
from sana_jax.runtime.files import reason_of

ARCHIVES = {".tar": "webdataset", ".parquet": "parquet"}  # what reads a file, by its suffix


def open_source(
    spec: str,
    split: str = "train",
    data_dir: str | None = None,
    size: int = 128,
    resumes: bool = False,
) -> Source:
    """Opens `spec`, one of

    - `shapes`: the built-in data set at `size` pixels, prepared under `data_dir` before;
    - `tfds:NAME[/CONFIG][:VERSION]`: a prepared TFDS data set under `data_dir`;
    - `webdataset:TARS`: tars of pictures, in a folder, by a pattern or by the index of wids
      (webdataset.py, archives.py);
    - `parquet:FILES`: Parquet with the bytes of pictures (parquet.py);
    - `latents:TARS`: tars of latents, as SANA's own code stores them (latent_tars.py);
    - `precomputed:DIR`: latents of that split that `python -m sana_jax.precompute` wrote to DIR or
      to DIR/split;
    - `captioned:DIR`: the records of another source with the captions and scores that
      `python -m sana_jax.caption` or `clip_score` wrote to DIR, or to DIR/split;
    - anything else: a folder of images, of which layout.choose finds the split.

    Args:
      resumes: whether the data has been read before, so that it is only away if it is not there.

    Raises UserError if there is no such folder, data set or split, or nothing in it; Retry instead
    where `resumes`.
    """
    try:
        return _open(spec, split, data_dir, size)
    except (NoData, OSError) as error:
        if isinstance(error, OSError):
            error = NoData(f"{spec}: {reason_of(error)}")
        if resumes:
            raise Retry(f"{error} (it was there before; try again when it is back)") from None
        raise error from None


def is_stored(spec: str) -> bool:
    """Returns whether a source has latents in place of pictures."""
    return spec.startswith(("precomputed:", "latents:"))


def check_apart(train: Source, held_out: Source, train_split: str, test_split: str) -> None:
    """Raises UserError if two splits, given with their names, have records in common.

    These are records of TFDS, and pictures of folders that are links to the same file.
    """
    files: dict[str, list[tuple[int, int]]] = {}
    for file, first, end in getattr(train, "places", None) or ():
        files.setdefault(file, []).append((first, end))
    common = sum(
        max(0, min(end, last) - max(first, start))
        for file, first, end in getattr(held_out, "places", None) or ()
        for start, last in files.get(file, ())
    )
    if common:
        raise UserError(
            f"config.data.train_split={train_split} and config.data.test_split={test_split} have"
            f" {common} records in common: percentages are rounded to whole records; give numbers"
            " of records, such as train[100:] and train[:100]. In folders, links lead to the same"
            " files; remove them from one"
        )


def _open(spec: str, split: str, data_dir: str | None, size: int) -> Source:
    if spec == "shapes":
        # What draws is not needed to read other sources.
        from sana_jax.shapes.dataset import open_split

        return Fingerprinted(open_split(data_dir, split, size), f"shapes {split} {size}")
    if spec.startswith("tfds:"):
        source = TFDSSource(spec.removeprefix("tfds:"), split, data_dir)
        return Fingerprinted(source, source.name)
    if spec.startswith("webdataset:"):
        from sana_jax.data.webdataset import WebDataset

        tars = WebDataset(spec.removeprefix("webdataset:"), split)
        return Fingerprinted(tars, tars.listing)
    if spec.startswith("latents:"):
        from sana_jax.data.latent_tars import LatentTars

        return LatentTars(spec.removeprefix("latents:"), split)
    if spec.startswith("parquet:"):
        from sana_jax.data.parquet import Parquet

        rows = Parquet(spec.removeprefix("parquet:"), split)
        return Fingerprinted(rows, rows.listing)
    if spec.startswith("precomputed:"):
        from sana_jax.data.precomputed import Precomputed

        return Precomputed(spec.removeprefix("precomputed:"), split)
    if spec.startswith("captioned:"):
        return Labelled(spec.removeprefix("captioned:"), split, _open)
    root = epath.Path(spec).expanduser()
    try:
        if (kind := ARCHIVES.get(root.suffix)) and root.is_file():
            raise UserError(f"{spec} is no folder but an archive: write {kind}:{spec}")
        if not root.is_dir():
            known = (
                "shapes, tfds:NAME, webdataset:TARS, parquet:FILES, latents:TARS, precomputed:DIR,"
                " captioned:DIR or a folder of images"
            )
            raise NoData(f"{spec}: there is no such folder; the data is {known}")
        folder = Folder(root, split)
    except ImportError as error:  # of what reads such addresses
        raise UserError(f"{spec}: {error}") from None
    return Fingerprinted(folder, folder.listing)
