"""The data loaders of a text-to-image training, by config.data."""

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sana_jax import sharding
from sana_jax.checkpoints.components import Checkpoint
from sana_jax.data.captions import CaptionChoice
from sana_jax.data.images import MOST_PIXELS
from sana_jax.data.loader import LoaderConfig, TrainingLoader
from sana_jax.data.orders import bucket_order
from sana_jax.data.precomputed import Precomputed, weights_sha256
from sana_jax.data.rejections import Budget
from sana_jax.data.sources import check_apart, open_source
from sana_jax.data.text_image import CaptionEmbeddings, CaptionTokens, TextImageTransform
from sana_jax.data.transforms import BucketTransform, ImageTransform, StoredLatents
from sana_jax.models import buckets
from sana_jax.runtime import hosts
from sana_jax.runtime.checks import read_group, within
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import is_local
from sana_jax.training.text_to_image.recipe import EvaluationConfig


class Split(NamedTuple):
    """A split of the data, and the way its batches are read."""

    name: str
    batch_size: int
    crop: str
    flip: bool
    seed: int
    captions: CaptionChoice


def make_loaders(
    config: ConfigDict,
    workdir: epath.Path,
    base: Checkpoint,
    captions: CaptionTokens,
    mesh: Mesh,
    size: int,
) -> list[TrainingLoader]:
    """Returns the loader of the training split and, if the config evaluates, of the test split.

    Raises UserError if the data does not fit the config or the networks. Only after these
    checks does it write: the data set shapes, and the sizes of images for buckets, below `workdir`.
    """
    data, folder = config.data, epath.Path(config.data.data_dir or workdir / "data")
    batch_size = config.recipe.batch_size
    choice = read_group(CaptionChoice, data.captions.to_dict(), "config.data.captions")
    wanted = [Split(data.train_split, batch_size, data.crop, data.flip, config.seed, choice)]
    if config.loop.evaluate_every:
        held = read_group(EvaluationConfig, config.evaluation.to_dict(), "config.evaluation")
        given = data.test_split, held.batch_size, "centre", False, held.seed, held.captions
        wanted.append(Split(*given))

    within("config.data.max_pixels", data.max_pixels, 1, MOST_PIXELS)
    stored, table = data.source.startswith("precomputed:"), ()
    if stored:
        if data.flip or data.upscale or data.crop != "centre":
            raise UserError(
                "config.data.crop, .flip and .upscale: stored latents stay as they are; give"
                " centre, False and False"
            )
        images = [StoredLatents() for _ in wanted]
    else:
        table = buckets.training_buckets(size) if data.buckets else ()
        _check_sequence(mesh, base, {height for height, _ in table} or {size})
        images = [
            BucketTransform(table, split.crop, split.flip, data.upscale, max_pixels=data.max_pixels)
            if table
            else ImageTransform(
                *(size, size, split.crop, split.flip, data.upscale), max_pixels=data.max_pixels
            )
            for split in wanted
        ]
    if data.source == "shapes":
        _draw_shapes(folder, size, data.shapes, wanted)
    # What was trained on before is only away if it is not there.
    resumes = any((workdir / "checkpoints").glob("[0-9]*"))
    sources = [
        open_source(data.source, split.name, str(folder), size, resumes and split is wanted[0])
        for split in wanted
    ]
    if len(sources) > 1:
        check_apart(*sources, data.train_split, data.test_split)
    if stored:
        _check_stored(sources, config, base, captions, mesh, size)

    # The sizes are kept in files of a local disk; an object store has no place for them.
    cache = workdir / "data" / "sizes" if is_local(workdir) else None
    options = read_group(LoaderConfig, config.loader.to_dict(), "config.loader")
    budget, loaders = Budget(options.bad_fraction), []
    for source, image, split in zip(sources, images, wanted, strict=True):
        order, text = None, captions
        if data.buckets or stored:
            how = dict(upscale=data.upscale, cache=cache, max_pixels=data.max_pixels)
            order = bucket_order(source, table, split.batch_size, split.seed, **how)
        if stored and source.rows:
            text = CaptionEmbeddings(source.rows)
        loaders.append(
            TrainingLoader(
                source,
                TextImageTransform(image, text, split.captions),
                batch_size=split.batch_size,
                seed=split.seed,
                order=order,
                rows=sharding.batch_rows(mesh, split.batch_size),
                threads=options.threads,
                prefetch=options.prefetch,
                budget=budget,
            )
        )
    return loaders


def _draw_shapes(
    folder: epath.Path, size: int, records: ConfigDict, splits: Iterable[Split]
) -> None:
    """Draws the built-in data set. Raises UserError if a split has less than a batch."""
    for name, rows, *_ in splits:
        if name not in ("train", "test"):
            raise UserError(f"shapes has no split {name!r}; it has train and test")
        if records[name] < rows:
            raise UserError(f"config.data.shapes.{name}={records[name]}: a batch has {rows} rows")
    from sana_jax.shapes.dataset import prepare  # only this source needs the drawing code

    hosts.on_first_host(prepare, folder, size, records.train, records.test, records.seed)


def _check_sequence(mesh: Mesh, base: Checkpoint, heights: Iterable[int]) -> None:
    """Raises UserError if the mesh cannot split the tokens of images of these heights."""
    parts, token = mesh.shape["sequence"], base.vae.factor * base.dit.patch_size
    wrong = [height for height in sorted(heights) if height // token % parts]
    if wrong:
        raise UserError(
            f"config.mesh.sequence={parts}: images {wrong[0]} pixels high have"
            f" {wrong[0] // token} rows of tokens, which it does not divide"
        )


def _check_stored(
    sources: Sequence[Precomputed],
    config: ConfigDict,
    base: Checkpoint,
    captions: CaptionTokens,
    mesh: Mesh,
    size: int,
) -> None:
    """Raises UserError if stored data is of other networks, texts or sizes than the config."""
    data, factor, patch = config.data, base.vae.factor, base.dit.patch_size
    autoencoder = weights_sha256(base.vae, base.params["vae"])
    text = json.loads(json.dumps(captions.settings))
    for source in sources:
        folder = source.folder
        if source.index.get("autoencoder") != autoencoder:
            raise UserError(f"{folder} is not of config.autoencoder={config.autoencoder}")
        shapes = np.unique(source.shapes, axis=0)
        if not data.buckets and (shapes * factor != size).any():
            height, width = factor * shapes[(shapes * factor != size).any(1)][0]
            raise UserError(
                f"{folder} has latents of {height} x {width} pixels, config.data.size is {size}:"
                " give that size, or config.data.buckets=True for several"
            )
        if (shapes % patch).any():
            raise UserError(f"{folder} has latents that patches of {patch} do not divide")
        areas = (shapes * factor / size).prod(1)
        if ((areas < 0.5) | (areas > 2)).any():  # buckets are within a tenth
            height, width = factor * shapes[np.abs(np.log(areas)).argmax()]
            raise UserError(
                f"{folder} has latents of {height} x {width} pixels, which is no bucket of"
                f" config.data.size={size}: give the size that they were made for"
            )
        _check_sequence(mesh, base, set((factor * shapes[:, 0]).tolist()))
        if not source.rows:
            continue
        if config.text_encoder.train:
            raise UserError(f"{folder} has embeddings, which a text encoder that trains cannot use")
        if source.index["text"] != text:
            raise UserError(
                f"{folder} has embeddings of another tokenizer, instruction or number of rows than"
                " config.text_encoder"
            )
        encoder = weights_sha256(base.text_encoder, base.params["text_encoder"])
        if source.index.get("text_encoder") != encoder:
            raise UserError(
                f"{folder} has embeddings that are not of config.text_encoder.checkpoint="
                f"{config.text_encoder.checkpoint}"
            )
