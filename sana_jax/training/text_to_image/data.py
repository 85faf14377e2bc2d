"""The data loaders of a text-to-image training, by config.data."""

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sana_jax import sharding
from sana_jax.checkpoints.components import Checkpoint
from sana_jax.data.caption_template import Captioned, CaptionTemplate
from sana_jax.data.captions import CaptionChoice
from sana_jax.data.first_look import check_first
from sana_jax.data.images import MOST_PIXELS
from sana_jax.data.latent_tars import LatentTars, first_rms
from sana_jax.data.loader import LoaderConfig, TrainingLoader
from sana_jax.data.orders import GlobalOrder, Order, bucket_order
from sana_jax.data.precomputed import Precomputed, weights_sha256
from sana_jax.data.prior import WeightedRows
from sana_jax.data.records import Source
from sana_jax.data.rejections import Budget
from sana_jax.data.sources import check_apart, is_stored, open_source
from sana_jax.data.text_image import CaptionEmbeddings, CaptionTokens, TextImageTransform
from sana_jax.data.transforms import (
    BucketTransform,
    ImageTransform,
    StoredLatents,
    Transform,
)
from sana_jax.models import buckets
from sana_jax.runtime import hosts
from sana_jax.runtime.checks import read_group, within
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import is_local
from sana_jax.training.text_to_image.prior import class_prompts, with_prior
from sana_jax.training.text_to_image.recipe import EvaluationConfig, has_prior


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
    reader_trains: bool = False,
) -> list[TrainingLoader]:
    """Returns the loader of the training split and, if the config evaluates, of the test split.

    A text encoder that trains, or a LoRA of it, reads tokens and no stored embeddings.
    Raises UserError if the data does not fit the config or the networks. Only after these
    checks does it write below `workdir`: the data set shapes, the sizes of images for buckets, and
    the pictures of config.prior.
    """
    data, folder = config.data, epath.Path(config.data.data_dir or workdir / "data")
    wanted, of_class = _splits(config), class_prompts(config)
    within("config.data.max_pixels", data.max_pixels, 1, MOST_PIXELS)
    stored, table = is_stored(data.source), ()
    if stored:
        _check_options_of_stored(config)
    else:
        table = buckets.training_buckets(size) if data.buckets else ()
        _check_sequence(mesh, base, {height for height, _ in table} or {size})
    images = [_image_transform(config, split, table, size) for split in wanted]
    template = None
    if data.caption is not None:
        template = CaptionTemplate(data.caption, epath.Path(data.source).name)
    if data.source == "shapes":
        _draw_shapes(folder, size, data.shapes, wanted)
    # What was trained on before is only away if it is not there.
    resumes = any((workdir / "checkpoints").glob("[0-9]*"))
    sources = [
        open_source(data.source, split.name, str(folder), size, resumes and split is wanted[0])
        for split in wanted
    ]
    if template is not None:
        sources = [Captioned(source, template) for source in sources]
    if len(sources) > 1:
        check_apart(*sources, data.train_split, data.test_split)
    if stored:
        _check_stored(sources, config, base, captions, mesh, size, reader_trains)
    texts = [CaptionEmbeddings(s.rows) if stored and s.rows else captions for s in sources]
    transforms = [
        TextImageTransform(image, text, split.captions)
        for image, text, split in zip(images, texts, wanted, strict=True)
    ]
    options = read_group(LoaderConfig, config.loader.to_dict(), "config.loader")
    if data.check_first and not resumes:
        check_first(sources[0], transforms[0], data.check_first, options.threads)

    budget = Budget(options.bad_fraction)
    orders: list[Order | None] = [None] * len(wanted)
    if data.buckets or stored:
        orders = _bucket_orders(config, workdir, sources, wanted, table)
    if of_class:  # last, for it draws pictures, with all that is above in order
        order = orders[0] or GlobalOrder(len(sources[0]), config.seed)
        given = sources[0], order, table or ((size, size),), resumes
        sources[0], orders[0] = with_prior(config, of_class, workdir, *given)
        transforms[0] = WeightedRows(transforms[0], config.prior.weight)
    return [
        TrainingLoader(
            source,
            transform,
            batch_size=split.batch_size,
            seed=split.seed,
            order=order,
            rows=sharding.batch_rows(mesh, split.batch_size),
            threads=options.threads,
            prefetch=options.prefetch,
            workers=options.workers,
            budget=budget,
            repeat=data.repeat,
        )
        for source, transform, order, split in zip(sources, transforms, orders, wanted, strict=True)
    ]


def _splits(config: ConfigDict) -> list[Split]:
    """Returns the training split and, if the config evaluates, the test split."""
    data = config.data
    choice = read_group(CaptionChoice, data.captions.to_dict(), "config.data.captions")
    given = data.train_split, config.recipe.batch_size, data.crop, data.flip, config.seed, choice
    wanted = [Split(*given)]
    if config.loop.evaluate_every:
        held = read_group(EvaluationConfig, config.evaluation.to_dict(), "config.evaluation")
        given = data.test_split, held.batch_size, "centre", False, held.seed, held.captions
        wanted.append(Split(*given))
    return wanted


def _image_transform(
    config: ConfigDict, split: Split, table: tuple[tuple[int, int], ...], size: int
) -> Transform:
    """Returns what makes a record's pixels, in the sizes of `table` if there are any."""
    data = config.data
    if is_stored(data.source):
        return StoredLatents()
    options, pixels = (split.crop, split.flip, data.upscale), data.max_pixels
    if table:
        return BucketTransform(table, *options, max_pixels=pixels)
    return ImageTransform(size, size, *options, max_pixels=pixels)


def _check_options_of_stored(config: ConfigDict) -> None:
    """Raises UserError for options of pictures and captions, which are stored as they are."""
    data = config.data
    if data.flip or data.upscale or data.crop != "centre":
        raise UserError(
            "config.data.crop, .flip and .upscale: stored latents stay as they are; give"
            " centre, False and False"
        )
    if data.caption is not None or has_prior(config):
        raise UserError(
            "config.data.caption and config.prior: stored latents have their captions and no"
            " pictures beside them; give a folder of pictures, or leave these out"
        )


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


def _bucket_orders(
    config: ConfigDict,
    workdir: epath.Path,
    sources: Sequence[Source],
    wanted: Sequence[Split],
    table: Sequence[tuple[int, int]],
) -> list[Order]:
    """Returns the orders of batches in which all pictures are of one bucket."""
    data, orders = config.data, []
    # The sizes are kept in files of a local disk; an object store has no place for them.
    cache = workdir / "data" / "sizes" if is_local(workdir) else None
    how = dict(upscale=data.upscale, cache=cache, max_pixels=data.max_pixels, repeat=data.repeat)
    for source, split in zip(sources, wanted, strict=True):
        of_both = has_prior(config) and split is wanted[0]
        rows = split.batch_size // 2 if of_both else split.batch_size
        orders.append(bucket_order(source, table, rows, split.seed, **how))
    return orders


def _check_stored(
    sources: Sequence[Precomputed | LatentTars],
    config: ConfigDict,
    base: Checkpoint,
    captions: CaptionTokens,
    mesh: Mesh,
    size: int,
    reader_trains: bool,
) -> None:
    """Raises UserError if stored data is of other networks, texts or sizes than the config."""
    data, factor, patch = config.data, base.vae.factor, base.dit.patch_size
    for source in sources:
        folder = source.folder
        if isinstance(source, LatentTars):
            _check_unsigned(source, base, captions)
        else:
            _check_signed(source, config, base, captions)
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
        if source.rows and reader_trains:
            raise UserError(f"{folder} has embeddings, which a text encoder that trains cannot use")


def _check_signed(
    source: Precomputed, config: ConfigDict, base: Checkpoint, captions: CaptionTokens
) -> None:
    """Raises UserError if stored data is of other networks or texts than the config."""
    folder = source.folder
    if source.index.get("autoencoder") != weights_sha256(base.vae, base.params["vae"]):
        raise UserError(f"{folder} is not of config.autoencoder={config.autoencoder}")
    if not source.rows or config.text_encoder.train:
        return
    if source.index["text"] != json.loads(json.dumps(captions.settings)):
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


def _check_unsigned(source: LatentTars, base: Checkpoint, captions: CaptionTokens) -> None:
    """Raises UserError if latents cannot be of these networks; they do not say of which they are.

    Scaled latents have a root mean square near 1: a line says so if they are far from it.
    """
    folder, rows = source.folder, captions.settings["rows"]
    if source.channels != base.vae.latent_channels:
        raise UserError(
            f"{folder} has latents of {source.channels} channels, config.autoencoder"
            f" {base.vae.latent_channels}"
        )
    if source.rows not in (None, rows):
        raise UserError(f"{folder} has text features of {source.rows} rows, not {rows}")
    size = first_rms(source)
    if size is not None and abs(size - 1) > 0.3:
        logging.warning(
            "%s: the latents' root mean square is %.2f, where it is near 1 of scaled latents of"
            " the right autoencoder",
            folder,
            size,
        )
