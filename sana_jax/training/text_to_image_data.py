"""The batches of a text-to-image training, as config.data asks for them."""

import json
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sana_jax import hosts, sharding
from sana_jax.checkpoints.components import Checkpoint
from sana_jax.data import buckets
from sana_jax.data.captions import CaptionChoice
from sana_jax.data.loader import TrainingLoader
from sana_jax.data.orders import bucket_order
from sana_jax.data.precomputed import Precomputed, weights_sha256
from sana_jax.data.sizes import image_sizes
from sana_jax.data.sources import open_source
from sana_jax.data.text_image import CaptionEmbeddings, CaptionTokens, TextImageTransform
from sana_jax.data.transforms import BucketTransform, ImageTransform, StoredLatents
from sana_jax.errors import UserError


def make_loaders(
    config: ConfigDict,
    workdir: epath.Path,
    base: Checkpoint,
    captions: CaptionTokens,
    mesh: Mesh,
    size: int,
) -> list[TrainingLoader]:
    """That of the training split and, if the config evaluates, that of the test split.

    Draws the data set shapes, and keeps the sizes of images for buckets below `workdir`, when all
    else has been looked at. Raises UserError.
    """
    data, folder = config.data, epath.Path(config.data.data_dir or workdir / "data")
    wanted = [(data.train_split, config.recipe.batch_size, data.crop, data.flip, config.seed)]
    if config.loop.evaluate_every:
        held_out = config.evaluation
        wanted.append((data.test_split, held_out.batch_size, "centre", False, held_out.seed))
    try:
        choice = CaptionChoice(**data.captions.to_dict())
    except TypeError as error:
        raise UserError(f"config.data.captions: {error}") from None

    stored, table = data.source.startswith("precomputed:"), ()
    if stored:
        if data.flip or data.crop != "centre":
            raise UserError(
                "config.data.crop and .flip: stored latents stay as they are; give centre and False"
            )
        images = [StoredLatents() for _ in wanted]
    else:
        table = buckets.training_buckets(size) if data.buckets else ()
        _check_sequence(mesh, base, {height for height, _ in table} or {size})
        images = [
            BucketTransform(table, crop, flip, data.upscale)
            if table
            else ImageTransform(size, size, crop, flip, data.upscale)
            for _, _, crop, flip, _ in wanted
        ]
    if data.source == "shapes":
        _draw_shapes(folder, size, data.shapes, [(split, rows) for split, rows, *_ in wanted])
    sources = [open_source(data.source, split, str(folder), size) for split, *_ in wanted]
    if stored:
        _check_stored(sources, config, base, captions, mesh, size)

    # On an object store there is nowhere to keep the sizes.
    cache = None if "://" in str(workdir) else workdir / "data" / "sizes"
    loaders = []
    for source, image, (_, batch_size, _, _, seed) in zip(sources, images, wanted, strict=True):
        order, text = None, captions
        if data.buckets or stored:
            upscale = data.upscale
            if table and cache is not None:  # the other hosts find what the first has read
                hosts.from_first(lambda source=source: len(image_sizes(source, cache)))
            order = bucket_order(source, table, batch_size, seed, upscale=upscale, cache=cache)
        if stored and source.rows:
            text = CaptionEmbeddings(source.rows)
        loaders.append(
            TrainingLoader(
                source,
                TextImageTransform(image, text, choice),
                batch_size=batch_size,
                seed=seed,
                order=order,
                rows=sharding.batch_rows(mesh, batch_size),
                **config.loader,
            )
        )
    return loaders


def _draw_shapes(
    folder: epath.Path, size: int, wanted: ConfigDict, splits: Iterable[tuple[str, int]]
) -> None:
    """Prepares the built-in data set, once it is sure to have batches of so many rows."""
    for split, rows in splits:
        if split not in ("train", "test"):
            raise UserError(f"shapes has no split {split!r}; it has train and test")
        if wanted[split] < rows:
            raise UserError(f"config.data.shapes.{split}={wanted[split]}: a batch has {rows} rows")
    from sana_jax.data import shapes  # what draws is not needed for other sources

    hosts.from_first(shapes.prepare, folder, size, wanted.train, wanted.test, wanted.seed)


def _check_sequence(mesh: Mesh, base: Checkpoint, heights: Iterable[int]) -> None:
    """Raises UserError where the mesh cannot split the tokens of such images, in pixels."""
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
    """Raises UserError where the data is of other networks, texts or sizes than the config's."""
    data, factor, patch = config.data, base.vae.factor, base.dit.patch_size
    autoencoder = weights_sha256(base.vae, base.params["vae"])
    text = json.loads(json.dumps(captions.settings))
    for source in sources:
        folder = source.folder
        if source.index["autoencoder"] != autoencoder:
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
        if source.index["text_encoder"] != encoder:
            raise UserError(
                f"{folder} has embeddings that are not of config.text_encoder.checkpoint="
                f"{config.text_encoder.checkpoint}"
            )
