"""Compares a folder of pictures with a reference in Inception's features: evaluate --task=fid."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from sana_jax import sharding
from sana_jax.checkpoints import inception
from sana_jax.metrics import features, frechet
from sana_jax.metrics.features import Features, Network, Prepared
from sana_jax.metrics.kernel_distances import kid
from sana_jax.metrics.pictures import open_pictures
from sana_jax.metrics.precision_recall import NEIGHBOURS, precision_recall
from sana_jax.metrics.resizes import inception_input
from sana_jax.models.inception import WIDTH, InceptionV3
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import check_is_file, sha256_of


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything that decides the figures."""

    data: str  # the pictures: a folder, or that of a batch run
    reference: str | None  # a folder, or a .npz file with mu and sigma; None: only --statistics
    weights: str  # pytorch-fid's file
    resize: str = "bilinear"
    size: int | None = None  # of a square that pictures are resized and cropped to before
    jpeg: bool = False  # measure `data` as if it were stored as JPEG
    count: int | None = None  # the first pictures of either folder; None: all
    batch_size: int = 16
    workdir: str | None = None  # where features are kept; None: nowhere
    statistics: str | None = None  # a .npz file to write those of `data` to


def fid(options: Options, draw: Callable[[], None] | None = None) -> dict[str, Any]:
    """Returns FID, and KID, precision and recall where the reference is a folder, for JSON.

    `draw` is called once all else has been checked, and fills the folder of the pictures.
    Raises UserError, before a picture is measured for what can be seen before.
    """
    weights = Path(options.weights).expanduser()
    stored = None
    if options.reference is not None and options.reference.endswith(".npz"):
        stored = frechet.read_statistics(options.reference, WIDTH)
    check_is_file(weights, f"--weights={options.weights}")
    params = inception.load(weights)
    compared = stored is None and options.reference is not None
    reference = open_pictures(options.reference, "reference") if compared else None
    if draw is not None:
        draw()
    sources = {"data": open_pictures(options.data, "data")}
    sources |= {"reference": reference} if reference is not None else {}

    mesh = sharding.make_mesh()
    prepare = inception_input(options.resize, options.size)
    decides = {"resize": options.resize, "size": options.size}
    about = {"network": "inception-2015-12-05", "weights_sha256": sha256_of(weights)}
    found: dict[str, Features] = {}

    def network() -> Network:
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return features.on_mesh(_apply, jax.device_put(params, everywhere), mesh)

    with features.workdir(options.workdir) as folder:
        for name, source in sources.items():
            found[name] = features.measure(
                source,
                Prepared(prepare, decides, jpeg=options.jpeg and name == "data"),
                network,
                folder,
                about,
                batch_size=sharding.whole_batch(options.batch_size, mesh),
                count=options.count,
            )
        return about | decides | dataclasses.asdict(options) | _figures(found, stored, options)


def _apply(params: Any, batch: Any) -> jax.Array:
    return InceptionV3().apply({"params": params}, batch["image"])


def _figures(
    found: dict[str, Features], stored: frechet.Statistics | None, options: Options
) -> dict[str, Any]:
    data, reference = found["data"], found.get("reference")
    figures: dict[str, Any] = dict.fromkeys(("fid", "kid", "kid_std", "precision", "recall"))
    if data.counts.used < 2 or (reference is not None and reference.counts.used < 2):
        raise UserError("two pictures or more are needed in each folder")
    statistics = frechet.statistics(data.blocks)
    if options.statistics is not None:
        frechet.write_statistics(options.statistics, statistics)
    if reference is not None:
        stored = frechet.statistics(reference.blocks)
    if stored is not None:
        figures["fid"] = frechet.frechet_distance(statistics, stored)
    if reference is not None:
        x, y = data.some(), reference.some()
        figures["kid"], figures["kid_std"] = kid(x, y)
        if min(len(x), len(y)) > NEIGHBOURS:
            figures["precision"], figures["recall"] = precision_recall(x, y)
    about = data.about() | (reference.about("reference_") if reference is not None else {})
    return figures | about


def table(found: dict[str, Any]) -> str:
    """Formats the figures for people."""
    lines = []
    for name, label in (
        ("fid", "FID"),
        ("kid", "KID"),
        ("precision", "precision"),
        ("recall", "recall"),
    ):
        value = found[name]
        spread = f" +- {found['kid_std']:.6f}" if name == "kid" and value is not None else ""
        lines.append(f"{label:12}" + ("-" if value is None else f"{value:.6f}{spread}"))
    return "\n".join(lines)
