"""Measures how well an autoencoder reconstructs a data set: evaluate --task=reconstruction."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from sana_jax import sharding
from sana_jax.checkpoints.components import module_for
from sana_jax.checkpoints.load import open_checkpoint, place_all
from sana_jax.data.loader import EvaluationLoader
from sana_jax.data.records import NoData, Source
from sana_jax.data.sources import is_stored, open_source
from sana_jax.data.transforms import ImageTransform
from sana_jax.metrics import lpips
from sana_jax.metrics.reconstruction import to_uint8
from sana_jax.metrics.reconstruction_figures import Images, figures
from sana_jax.pictures import Picture, make_grid, to_float
from sana_jax.runtime import checks
from sana_jax.runtime.devices import cache_folder
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.progress import Progress
from sana_jax.shapes.dataset import prepare

SHAPES_TEST = 1000  # images of the built-in data set that are made where there are none
SHOWN = 8  # images in the sheet


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything but the checkpoint that decides the figures."""

    data: str = "shapes"
    data_dir: str | None = None
    split: str | None = None  # None: test, or all of a folder without such a subfolder
    size: int = 128  # side of the images in pixels
    count: int | None = None  # the first images of the data; None: all
    batch_size: int = 16
    dtype: str = "float32"
    lpips_weights: str | None = None  # None: LPIPS is not measured
    variant: str | None = None
    revision: str | None = None


class Report(NamedTuple):
    """The result of a measurement."""

    figures: dict[str, Any]  # for JSON, with what was measured
    text: str  # the same for people
    sheet: Picture | None


def reconstruction(name: str, options: Options, draw_sheet: bool = False) -> Report:
    """Measures the autoencoder of the checkpoint `name`; `draw_sheet` adds a sheet of pictures.

    Raises UserError.
    """
    size = options.size
    checkpoint = open_checkpoint(name, variant=options.variant, revision=options.revision)
    checkpoint = dataclasses.replace(checkpoint, dit=None, text_encoder=None)
    config = checkpoint.vae
    checks.multiple(f"--size={size}", size, config.factor)
    distance = None
    if options.lpips_weights is not None:
        measure = jax.jit(partial(lpips.lpips, tower="alex"))
        distance = partial(measure, jax.device_put(lpips.load("alex", options.lpips_weights)))
        if size < lpips.SMALLEST["alex"]:
            raise UserError(f"--lpips_weights needs --size={lpips.SMALLEST['alex']} or more")
    source, split = open_data(options.data, options.data_dir, options.split, size)
    mesh = sharding.make_mesh()
    batch = sharding.whole_batch(options.batch_size, mesh)
    loader = EvaluationLoader(
        source, ImageTransform(size, size), batch_size=batch, limit=options.count
    )

    place_all(checkpoint, name, options.dtype, mesh)
    apply = jax.jit(module_for(config, options.dtype).apply)
    params = {"params": checkpoint.params["vae"]}

    def reconstruct(images: Images) -> Images:
        return apply(params, jax.device_put(images, sharding.batch_sharding(mesh)))

    values = config.latent_channels / config.factor**2
    with (
        jax.set_mesh(mesh),
        jax.default_matmul_precision("float32"),
        Progress(loader.records, "image") as progress,
    ):
        found = figures(reconstruct, loader, values, distance, progress.update)
        if not np.isfinite(found["psnr"]):
            raise UserError(
                f"{name} reconstructs some of {options.data} with NaN or infinite values: its"
                " weights are not those of a trained autoencoder, or need another --dtype"
            )
        sheet = pairs(reconstruct, loader) if draw_sheet else None

    data = options.data if split is None else f"{options.data} {split}"
    heading = f"{data}, {found['count']} images at {size} px; {loader.counts}"
    about = {
        "task": "reconstruction",
        "checkpoint": name,
        "data": options.data,
        "split": split,
        "size": size,
        "dtype": options.dtype,
    }
    rejected = {reason: count for reason, count in loader.counts.rejected.items() if count}
    return Report(about | found | {"rejected": rejected}, f"{heading}\n{table(found)}", sheet)


def open_data(
    data: str, data_dir: str | None, split: str | None, size: int
) -> tuple[Source, str | None]:
    """Returns the source and the name of its split, None for a folder without splits.

    Draws the test images of shapes into a cache where `data_dir` is None. Raises UserError.
    """
    if data == "shapes" and data_dir is None:
        if split not in (None, "test"):
            raise UserError(f"--split={split} of shapes: name the folder it is in with --data_dir")
        try:
            data_dir = str(cache_folder() / "shapes_test")
        except RuntimeError:
            raise UserError("there is no home folder for a cache: give --data_dir") from None
        # A record depends on its number and split alone: the others need not be drawn.
        prepare(data_dir, size, train=1, test=SHAPES_TEST)
    if is_stored(data):
        raise UserError(f"--data={data}: these are latents; give images")
    named = data == "shapes" or data.startswith("tfds:")
    if split is None and not named:
        try:
            return open_source(data, "test"), "test"
        except NoData:  # no folder is called so
            has_train = (epath.Path(data).expanduser() / "train").is_dir()
            return open_source(data), "train" if has_train else None
    split = split or "test"
    return open_source(data, split, data_dir, size), split


def pairs(reconstruct: Callable[[Images], Images], loader: EvaluationLoader) -> Picture:
    """Returns a sheet of the first usable images, with their reconstructions below them."""
    batches = (loader.load(step)[0] for step in range(len(loader)))
    batch = next(batch for batch in batches if batch["valid"].any())
    rows = batch["image"], to_uint8(reconstruct(to_float(batch["image"])))
    return make_grid([list(np.asarray(x)[batch["valid"]][:SHOWN]) for x in rows])


def table(found: dict[str, Any]) -> str:
    """Returns the figures as a table for people."""
    small = "x".join(map(str, found["baseline_size"]))
    lines = [f"{'':26}{'PSNR dB':>9}{'SSIM':>9}{'LPIPS':>9}{'fine detail':>13}"]
    for name, prefix in ("reconstruction", ""), (f"bicubic from {small}", "baseline_"):
        psnr, ssim, lpips, ratio = (
            found[prefix + key] for key in ("psnr", "ssim", "lpips", "high_frequency_ratio")
        )
        measured = (f"{value:.4f}" if value is not None else "-" for value in (lpips, ratio))
        lines.append("{:26}{:9.2f}{:9.4f}{:>9}{:>13}".format(name, psnr, ssim, *measured))
    return "\n".join(lines)
