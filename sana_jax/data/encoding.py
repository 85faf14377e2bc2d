"""What decides the records of a precomputed folder, and what it takes to encode them.

An `Encoding` has plain fields alone, so that it can be sent to other machines, each of which opens
the data and the networks for itself.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax

from sana_jax import sharding
from sana_jax.checkpoints.components import Checkpoint
from sana_jax.checkpoints.load import open_checkpoint, place_all
from sana_jax.data import precomputed
from sana_jax.data.encode import Encoder, WithTokens
from sana_jax.data.records import Source
from sana_jax.data.sources import is_stored, open_source
from sana_jax.data.text_image import CaptionTokens
from sana_jax.data.transforms import BucketTransform, ImageTransform
from sana_jax.models import buckets
from sana_jax.pipeline.request import Tile, tiles
from sana_jax.runtime import checks, devices
from sana_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Encoding:
    """The flags of `python -m sana_jax.precompute`, which says what they mean.

    Attributes:
      size, buckets: at most one; without both, buckets of the size that the checkpoint draws.
      instruct: encode captions after the checkpoint's instruction.
      batch: images at once.
    """

    checkpoint: str
    data: str
    split: str = "train"
    data_dir: str | None = None
    size: int | None = None
    buckets: int | None = None
    crop: str = "centre"
    seed: int = 0
    upscale: bool = False
    max_pixels: int = 8192 * 8192
    text: bool = False
    instruction_file: str | None = None
    instruct: bool = True
    variant: str | None = None
    revision: str | None = None
    batch: int = 16
    tile: str = "none"
    shard: int = 4096
    dtype: str = "float32"
    store: str = "bfloat16"

    def __post_init__(self):
        if self.size is not None and self.buckets is not None:
            raise UserError("give --size or --buckets, not both")
        if is_stored(self.data):
            raise UserError(f"--data={self.data}: these are latents already; give images")

    def image(self) -> ImageTransform | BucketTransform:
        """Returns the transform of a record's picture. Raises UserError."""
        options = dict(crop=self.crop, upscale=self.upscale, max_pixels=self.max_pixels)
        if self.size is not None:
            return ImageTransform(self.size, self.size, **options)
        return BucketTransform(buckets.training_buckets(self.buckets), **options)

    def tile_of(self, factor: int) -> Tile | None:
        """Returns the size and stride of tiles that --tile asks for. Raises UserError."""
        sizes = [(self.size,) * 2] if self.size else buckets.training_buckets(self.buckets)
        height, width = max(sizes, key=math.prod)
        try:
            given = self.tile if self.tile == "auto" else None
            if self.tile not in ("auto", "none"):
                given = tuple(map(int, self.tile.split(",")))
        except ValueError:
            raise UserError(
                f"--tile={self.tile}: give SIZE,STRIDE in pixels, auto or none"
            ) from None
        try:
            return tiles(factor, given, height, width)
        except UserError as error:
            raise UserError(f"--tile={self.tile}: {error}") from None

    def open(self, resumes: bool = False) -> "Opened":
        """Opens the networks and the data. Raises UserError, or Retry as open_source does."""
        whole = open_checkpoint(
            self.checkpoint,
            variant=self.variant,
            revision=self.revision,
            instruction_file=self.instruction_file,
            instruct=self.text and self.instruct,
        )
        sized = self
        if self.size is None and self.buckets is None:
            sized = dataclasses.replace(self, buckets=self._own_size(whole))
        image, checkpoint = sized.image(), self._networks(whole)
        tile = sized.tile_of(checkpoint.vae.factor)
        given = self.data, self.split, self.data_dir, self.size or 128
        source, tokens = open_source(*given, resumes=resumes), None
        if self.text:
            found = checkpoint.instruction
            told = found and found.text
            tokens = CaptionTokens(checkpoint.tokenizer, checkpoint.text_rows, told)
        return Opened(sized, checkpoint, source, WithTokens(image, tokens), tokens, tile)

    def _own_size(self, checkpoint: Checkpoint) -> int:
        """Returns the side, in pixels, of what a checkpoint draws, which has buckets."""
        if checkpoint.dit is None:
            raise UserError(f"give --size or --buckets: {self.checkpoint} has no transformer")
        size = checkpoint.dit.sample_size * checkpoint.vae.factor
        if size not in buckets.BASES:
            raise UserError(
                f"give --size or --buckets: {self.checkpoint} draws {size} px, where there are no"
                " buckets"
            )
        return size

    def _networks(self, checkpoint: Checkpoint) -> Checkpoint:
        """Returns the checkpoint with the networks that encode, and no others."""
        if self.size is not None:
            checks.multiple(f"--size={self.size}", self.size, checkpoint.vae.factor)
        if self.text and checkpoint.text_encoder is None:
            raise UserError(f"{self.checkpoint} has no text encoder, which --text needs")
        text_encoder = checkpoint.text_encoder if self.text else None
        return dataclasses.replace(checkpoint, dit=None, text_encoder=text_encoder)


@dataclasses.dataclass
class Opened:
    """The data and the networks of an encoding, whose weights are not read yet."""

    encoding: Encoding
    checkpoint: Checkpoint
    source: Source
    transform: WithTokens
    tokens: CaptionTokens | None
    tile: Tile | None

    def settings(self) -> dict[str, Any]:
        """Returns all that decides the records; a folder is continued with the same alone."""
        given, checkpoint = self.encoding, self.checkpoint
        encoder = checkpoint.text_encoder
        return {
            "format": precomputed.FORMAT,
            "data": given.data,
            "split": given.split,
            "source": self.source.fingerprint,
            "records": len(self.source),
            "image": given.image().settings | {"dtype": "uint8"},  # as folders begun before say
            "seed": given.seed,
            "autoencoder": precomputed.weights_sha256(checkpoint.vae, checkpoint.params["vae"]),
            "scaling_factor": checkpoint.vae.scaling_factor,
            "text": self.tokens and self.tokens.settings,
            "text_encoder": encoder
            and precomputed.weights_sha256(encoder, checkpoint.params["text_encoder"]),
            "dtype": given.dtype,
            "store": given.store,
            "batch": given.batch,
            "shard": given.shard,
        } | ({"tile": list(self.tile)} if self.tile else {})

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The encoder on all of this host's devices, to be made and used in `computing`."""
        given, mesh = self.encoding, self._mesh
        place_all(self.checkpoint, given.checkpoint, given.dtype, mesh)
        return Encoder(self.checkpoint, mesh, given.dtype, given.batch, self.tokens, self.tile)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """A block of one thread that uses the encoder.

        Raises UserError where the devices have too little memory.
        """
        with (
            jax.set_mesh(self._mesh),
            jax.default_matmul_precision("float32"),
            devices.memory_errors("a smaller --batch_size or --size, or --tile=1024,896"),
        ):
            yield

    @functools.cached_property
    def _mesh(self) -> jax.sharding.Mesh:
        return sharding.make_mesh()
