"""SanaPipeline: text -> embeddings -> latents -> pixels, jitted, sharded over a mesh."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float
from PIL import Image

from sana_jax import arguments, checkpoints, denoise, sharding, text
from sana_jax.checkpoints import diffusers, native
from sana_jax.checkpoints.components import (
    CONFIGS,
    Checkpoint,
    check_fit,
    component_dtype,
    module_for,
)
from sana_jax.data import buckets
from sana_jax.diffusion import dpm_solver
from sana_jax.errors import UserError
from sana_jax.files import local
from sana_jax.models import tiling
from sana_jax.models.gemma2 import Prefix
from sana_jax.new_folder import new_folder

NOT_FINITE = (
    "have NaN or infinite values: try another dtype, or clip_attention for weights that were"
    " trained in float16"
)
OUTPUTS = ("pil", "np", "float", "latent", "device")
DTYPES = ("float32", "bfloat16", "float16")
MAX_SIDE = 2**16  # pixels
REMEMBERED = 4  # instructions, and as many negative prompts; 50 MB an instruction in float32

# Pixels above which pictures are decoded in tiles unless told otherwise, and size and stride of
# these: what the reference recommends for 4096 px. The seams of smaller tiles show in flat areas.
LARGE, LARGE_TILE = 2048 * 2048, (1024, 896)

Tile = tuple[tiling.Size, tiling.Size]  # size, stride


class SanaPipeline:
    """Draws images from prompts. What a call gives depends on its arguments alone.

    What the text encoder makes of instructions and of negative prompts is kept for later calls, so
    give other weights of it to another pipeline.
    """

    def __init__(self, checkpoint: Checkpoint, mesh: Mesh, dtype: str = "bfloat16"):
        """`checkpoint` as `checkpoints.load` gives it, with its weights on `mesh`."""
        if missing := CONFIGS.keys() - checkpoint.configs():
            raise UserError(f"the checkpoint lacks {', '.join(sorted(missing))}: it draws nothing")
        check_fit(checkpoint)
        self.checkpoint, self.mesh, self.dtype = checkpoint, mesh, dtype
        self.dit, self.vae, self.text_encoder = (
            module_for(getattr(checkpoint, name), component_dtype(name, dtype)) for name in CONFIGS
        )
        self.params = checkpoint.params
        self._prefixes, self._negatives = OrderedDict(), OrderedDict()

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        dtype: str = "bfloat16",
        mesh: Mesh | None = None,
        variant: str | None = None,
        revision: str | None = None,
        instruction_file: str | None = None,
        clip_attention: bool | None = None,
    ) -> "SanaPipeline":
        """Loads a native or diffusers folder, a bundled model or a hub id.

        Args:
          name: the folder, the bundled name, or org/name.
          dtype: "float32", "bfloat16" or "float16", of weights and activations; beside a float16
            transformer the autoencoder and the text encoder are bfloat16.
          mesh: of sharding.make_mesh; None: this host's devices, the batch split over them.
          variant: of the weight files in a diffusers folder, such as "bf16".
          revision: branch, tag or commit on the hub.
          instruction_file: the complex human instruction, where the checkpoint does not hold it.
          clip_attention: True for weights that were trained in float16 (Sana 1.0 without BF16 in
            its name) and are run in another dtype; None: as the checkpoint says, else by dtype.

        Raises UserError, a ValueError, that says what is wrong with the checkpoint, and Retry where
        the hub does not answer.
        """
        arguments.choice("dtype", dtype, DTYPES)
        mesh = sharding.make_mesh() if mesh is None else mesh
        sharding.check_mesh(mesh)
        checkpoint = checkpoints.load(
            name,
            dtype,
            mesh,
            variant=variant,
            revision=revision,
            instruction_file=instruction_file,
            clip_attention=clip_attention,
        )
        return cls(checkpoint, mesh, dtype)

    def save_pretrained(self, path: str | Path, format: str = "native") -> None:
        """Writes a folder that from_pretrained reads; "diffusers": one that diffusers reads too."""
        formats = {"native": native.save, "diffusers": diffusers.save}
        if format not in formats:
            raise UserError(f"format {format!r} is not one of {', '.join(formats)}")
        with new_folder(path := local(path)):
            formats[format](self.checkpoint, path)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_steps: int = 20,
        guidance_scale: float | Sequence[float] = 4.5,
        guidance_interval: tuple[float, float] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        latents: Float[Array, "B h w c"] | None = None,
        prompt_embeddings: Float[Array, "B L T"] | None = None,
        prompt_mask: Bool[Array, "B L"] | None = None,
        sampler: str = "flow_dpm_solver",
        flow_shift: float | None = None,
        instruction: str | None = "auto",
        use_resolution_binning: bool = False,
        on_step: Callable[[int, Array], None] | None = None,
        output: str = "pil",
        sequential_guidance: bool = False,
        tile: Tile | str | None = "auto",
    ) -> list[Image.Image] | np.ndarray | Array:
        """Draws `num_images_per_prompt` images of every prompt, those of one prompt in a row.

        Args:
          negative_prompt: one for all, or one a prompt.
          height, width: pixels, multiples of the autoencoder's factor; None: the native size.
          num_steps: evaluations of the network (pairs of them, under guidance).
          guidance_scale: one for all, or one a prompt; no guidance where it is <= 1.
          guidance_interval: (low, high) in sigma; guide only where low < sigma <= high.
          seed: 0 .. 2**32 - 1; one an image, or the first image's, which the others count up from.
          latents: the noise to start from, float32; overrides `seed`.
          prompt_embeddings, prompt_mask: as `encode_prompt` gives them, instead of prompts.
          sampler: "flow_dpm_solver" or "flow_euler".
          flow_shift: None: the checkpoint's.
          instruction: "auto": the checkpoint's own; None: none; or the text.
          use_resolution_binning: sample at the nearest published size, then resize and crop.
          on_step: called as on_step(step, latents) after every step; slower than without.
          output: "pil", "np" (uint8 B H W 3), "float" (float32 in [0, 1]), "latent", or "device":
            as "np", but a jax array that is not waited for, and which images are finite.
          sequential_guidance: the halves of guidance one after the other, in less memory.
          tile: as in `decode`; "auto": above 2048 x 2048 pixels in tiles of 1024, else at once.

        Raises UserError, a ValueError, where an argument is out of range.
        """
        height, width, crop = self._sizes(height, width, use_resolution_binning)
        num_steps = arguments.whole("num_steps", num_steps, 1, arguments.MAX_STEPS)
        each = arguments.whole("num_images_per_prompt", num_images_per_prompt, 1, 2**16)
        sampler = arguments.choice("sampler", sampler, dpm_solver.SAMPLERS)
        output = arguments.choice("output", output, OUTPUTS)
        shift = self.checkpoint.flow_shift if flow_shift is None else flow_shift
        shift = arguments.number("flow_shift", shift, 1e-3, 1e3)
        interval = arguments.interval("guidance_interval", guidance_interval)
        tile = self._tile(tile, height, width)
        if on_step is not None and not callable(on_step):
            raise UserError(f"on_step {on_step!r} cannot be called")
        if prompt is None and prompt_embeddings is None:
            raise UserError("give a prompt, or prompt_embeddings and prompt_mask")
        if prompt is None:
            rows = self.checkpoint.text_rows
            shape = ("prompts", rows, self.checkpoint.dit.caption_channels)
            count = arguments.array("prompt_embeddings", prompt_embeddings, shape).shape[0]
            arguments.array("prompt_mask", prompt_mask, (count, rows), np.bool_)
        elif prompt_embeddings is None and prompt_mask is None:
            prompt = arguments.texts("prompt", prompt)
            count = len(prompt)
        else:
            raise UserError("give prompt or prompt_embeddings, not both")
        negative = arguments.texts("negative_prompt", negative_prompt or "")
        if len(negative) not in (1, count):
            raise UserError(f"{len(negative)} negative prompts for {count} prompts")
        scale = arguments.per_prompt("guidance_scale", guidance_scale, count)
        shape = (height // self.factor, width // self.factor, self.latent_channels)
        if latents is None:
            seeds = arguments.seeds(seed, count * each)
        else:
            arguments.array("latents", latents, (count * each, *shape))

        if prompt is not None:
            prompt_embeddings, prompt_mask = self.encode_prompt(prompt, instruction)
        else:  # another pipeline's may be on other devices
            given = prompt_embeddings, prompt_mask
            everywhere = NamedSharding(self.mesh, PartitionSpec())
            prompt_embeddings, prompt_mask = jax.device_put(given, everywhere)
        captions, masks = prompt_embeddings[:, None], prompt_mask[:, None]  # (B, 1, L, T)
        if (scale > 1).any():
            rows, mask = self._encode_negative(negative)
            rows = jnp.broadcast_to(rows[:, None], captions.shape)
            mask = jnp.broadcast_to(mask[:, None], masks.shape)
            captions = jnp.concatenate([rows, captions], axis=1)
            masks = jnp.concatenate([mask, masks], axis=1)
        captions, masks = (jnp.repeat(x, each, axis=0) for x in (captions, masks))
        scale = np.maximum(scale, 1).repeat(each)[:, None, None, None]
        count *= each

        noise = _draw(seeds, shape) if latents is None else jnp.asarray(latents, jnp.float32)
        schedule = dpm_solver.SAMPLERS[sampler](num_steps, shift)
        noise, captions, masks, scale = map(self._spread, (noise, captions, masks, scale))
        run = denoise.sample
        if on_step is not None:
            run = partial(denoise.sample_slowly, lambda i, x: on_step(i, x[:count]))
        with self._context():
            latents = run(
                self.dit,
                self.params["dit"],
                noise,
                schedule,
                captions,
                masks,
                scale,
                interval,
                sequential=sequential_guidance,
            )
        if output == "latent":
            return latents[:count]
        images = self._decode_padded(latents, tile)
        if crop is not None:
            images = _resize_and_crop(images, crop)
        if output == "float":
            return _to_float(images)[:count]
        images, finite = (array[:count] for array in _to_uint8(images))
        if output == "device":
            return images, finite
        images = np.asarray(images)
        if not finite.all():
            logging.warning("%d of %d images %s", count - int(finite.sum()), count, NOT_FINITE)
        return [Image.fromarray(image) for image in images] if output == "pil" else images

    def encode_prompt(
        self, prompts: str | Sequence[str], instruction: str | None = "auto"
    ) -> tuple[Float[Array, "B L T"], Bool[Array, "B L"]]:
        """The text encoder's rows in float32 and which of them count; hidden rows are zeros."""
        prompts = arguments.texts("prompt", prompts)
        if instruction == "auto":
            found = self.checkpoint.instruction
            instruction = found and found.text
        elif instruction is not None and not isinstance(instruction, str):
            raise UserError(f"instruction {instruction!r} is neither a text nor None")
        tokenized = text.tokenize(
            self.checkpoint.tokenizer, prompts, self.checkpoint.text_rows, instruction
        )
        tokens, mask = self._spread(tokenized.tokens), self._spread(tokenized.mask)
        prefix = self._read_prefix(tokenized.prefix)
        with self._context():
            params = self.params["text_encoder"]
            rows = _encode_text(self.text_encoder, params, tokens, prefix, tokenized.window, mask)
        return rows[: len(prompts)], mask[: len(prompts)]

    def _read_prefix(self, tokens: tuple[int, ...]) -> Prefix | None:
        """What the text encoder makes of the tokens of an instruction."""

        def read():
            with self._context():
                params = self.params["text_encoder"]
                return _read_prefix(self.text_encoder, params, np.array([tokens], np.int32))

        return _remembered(self._prefixes, tokens, read) if tokens else None

    def _encode_negative(self, prompts: list[str]) -> tuple[Array, Array]:
        """As `encode_prompt`, without an instruction; one row where all prompts are the same.

        That one is encoded alone, so that its bits do not depend on the batch that came first.
        """
        if len(set(prompts)) > 1:
            return self.encode_prompt(prompts, None)
        encode = partial(self.encode_prompt, prompts[:1], None)
        return _remembered(self._negatives, prompts[0], encode)

    def velocity(
        self,
        latents: Float[Array, "B h w c"],
        timestep: Float[Array, " B"],
        embeddings: Float[Array, "B L T"],
        mask: Bool[Array, "B L"],
    ) -> Float[Array, "B h w c"]:
        """The network once, without guidance; `timestep` in 0 .. 1000, used as given."""
        patch, rows = self.checkpoint.dit.patch_size, "text rows"
        batch = arguments.array("latents", latents, ("B", "h", "w", self.latent_channels)).shape[0]
        if latents.shape[1] % patch or latents.shape[2] % patch:
            raise UserError(f"latents {latents.shape} do not divide into patches of {patch}")
        embeddings_shape = (batch, rows, self.checkpoint.dit.caption_channels)
        rows = arguments.array("embeddings", embeddings, embeddings_shape).shape[1]
        arguments.array("mask", mask, (batch, rows), np.bool_)
        if np.ndim(timestep):
            arguments.array("timestep", timestep, (batch,), np.number)
        timestep = jnp.broadcast_to(jnp.asarray(timestep, jnp.float32), batch)
        inputs = [self._spread(x) for x in (latents, timestep, embeddings, mask)]
        with self._context():
            return predict_velocity(self.dit, self.params["dit"], *inputs)[: latents.shape[0]]

    def decode(
        self, latents: Float[Array, "B h w c"], tile: Tile | str | None = None
    ) -> Float[Array, "B H W 3"]:
        """Pixels in [-1, 1], not clamped, from the sampler's latents (which it unscales).

        `tile`: (size, stride) in pixels, for pictures too large to decode at once; "auto": as in a
        call.
        """
        arguments.array("latents", latents, ("B", "h", "w", self.latent_channels))
        height, width = (side * self.factor for side in latents.shape[1:3])
        tile = self._tile(tile, height, width)
        return self._decode_padded(self._spread(latents), tile)[: latents.shape[0]]

    def encode(
        self, images: Float[Array, "B H W 3"], tile: Tile | str | None = None
    ) -> Float[Array, "B h w c"]:
        """Latents as the sampler sees them (scaled), from pixels in [-1, 1]."""
        channels = self.checkpoint.vae.in_channels
        arguments.array("images", images, ("B", "H", "W", channels))
        for name, side in zip(("height", "width"), images.shape[1:3], strict=True):
            arguments.multiple(f"{name} {side}", side, self.factor)
        tile = self._tile(tile, *images.shape[1:3])
        run = partial(_encode, self.vae, self.params["vae"])
        padded = self._spread(images)
        with self._context():
            if tile is None:
                latents = run(padded)
            else:
                latents = tiling.tiled_encode(run, padded, *tile, self.factor)
        return latents[: images.shape[0]]

    @property
    def factor(self) -> int:
        """Pixels a side of a latent."""
        return self.checkpoint.vae.factor

    @property
    def latent_channels(self) -> int:
        return self.checkpoint.vae.latent_channels

    @property
    def native_size(self) -> int:
        """The side, in pixels, of the pictures that the network was trained on."""
        return self.checkpoint.dit.sample_size * self.factor

    def _decode_padded(self, latents: Array, tile: Tile | None = None) -> Array:
        devices = sharding.batch_divisor(self.mesh)
        run = partial(decode_latents, self.vae, self.params["vae"], devices=devices)
        with self._context():
            if tile is None:
                return run(latents)
            return tiling.tiled_decode(run, latents, *tile, self.factor)

    def _tile(self, tile, height: int, width: int) -> Tile | None:
        """(size, stride) as tiling.py takes them, or None for the whole picture at once."""
        if isinstance(tile, str) and tile == "auto":
            return LARGE_TILE if height * width > LARGE else None
        if tile is None:
            return None
        if not isinstance(tile, Sequence) or isinstance(tile, str) or len(tile) != 2:
            raise UserError(f"tile {tile!r} is not a pair (size, stride) in pixels")
        for side in (side for pair in tiling.check(*tile, self.factor) for side in pair):
            # Else the strips of the tiles would not end where the picture does.
            arguments.multiple(f"tile {tuple(tile)}: {side}", side, self.factor)
        return tuple(tile)

    def _sizes(self, height, width, binning: bool):
        """(height, width) to sample at, and the size to resize and crop to, or None."""
        native = self.native_size
        height = arguments.whole("height", native if height is None else height, 1, MAX_SIDE)
        width = arguments.whole("width", native if width is None else width, 1, MAX_SIDE)
        if not binning:
            for name, side in ("height", height), ("width", width):
                step = self.factor * self.checkpoint.dit.patch_size
                arguments.multiple(f"{name} {side}", side, step)
            return height, width, None
        bucket = buckets.nearest(height, width, native)
        return *bucket, (None if bucket == (height, width) else (height, width))

    def _spread(self, x) -> Array:
        """`x` with its batch split over the mesh; padded with copies of the last row to fit."""
        x = np.asarray(x) if not isinstance(x, jax.Array) else x
        missing = -x.shape[0] % sharding.batch_divisor(self.mesh)
        if missing:
            x = jnp.concatenate([jnp.asarray(x), jnp.repeat(x[-1:], missing, axis=0)])
        return jax.device_put(x, sharding.batch_sharding(self.mesh))

    @contextlib.contextmanager
    def _context(self):
        """Inside, networks know the mesh, and float32 means float32 on every device."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(jax.set_mesh(self.mesh))
            if self.dtype == "float32":
                stack.enter_context(jax.default_matmul_precision("float32"))
            yield


def _remembered(cache: OrderedDict, key: Hashable, compute: Callable[[], Any]) -> Any:
    """What `compute` gave for this key, or gives now; the least recently used entry is dropped."""
    value = cache.pop(key, None) or compute()
    cache[key] = value
    if len(cache) > REMEMBERED:
        cache.popitem(last=False)
    return value


@partial(jax.jit, static_argnums=0)
def _read_prefix(module: nn.Module, params: Any, tokens):
    return module.apply({"params": params}, tokens, method="read_prefix")


@partial(jax.jit, static_argnums=0)
def _encode_text(module: nn.Module, params: Any, tokens, prefix: Prefix | None, window, mask):
    hidden = module.apply({"params": params}, tokens, prefix)
    return text.gather_window(hidden, window, mask, prefix and prefix.first)


@partial(jax.jit, static_argnums=0)
def predict_velocity(module: nn.Module, params: Any, latents, timestep, captions, mask):
    """(B, h, w, c): the transformer once, text from its embeddings (B, L, C) on."""
    keys_values = module.apply({"params": params}, captions, method="keys_values")
    return module.apply({"params": params}, latents, timestep, keys_values, mask, method="denoise")


@partial(jax.jit, static_argnums=0, static_argnames="devices")
def decode_latents(module: nn.Module, params: Any, latents, devices: int = 1):
    """(B, H, W, 3) in about [-1, 1] from scaled latents (B, h, w, c), split over `devices`.

    Each device decodes as many pictures at once as have LARGE pixels, or one: the autoencoder needs
    ten times the memory of the transformer for a pixel.
    """
    decode = partial(module.apply, {"params": params}, method="decode")
    latents = latents / module.config.scaling_factor
    most = max(1, LARGE // (latents.shape[1] * latents.shape[2] * module.config.factor**2))
    return tiling.decode_in_groups(decode, latents, devices, most)


@partial(jax.jit, static_argnums=0)
def _encode(module: nn.Module, params: Any, images):
    latents = module.apply({"params": params}, images, method="encode")
    return latents * module.config.scaling_factor


@partial(jax.jit, static_argnums=1)
def _draw(seeds, shape: tuple[int, ...]):
    """Standard normal noise, each image from its own key.

    The generator is named, or the environment's default would decide about the picture.
    """

    def draw(seed):
        return jax.random.normal(jax.random.key(seed, impl="threefry2x32"), shape, jnp.float32)

    with jax.threefry_partitionable(True):
        return jax.vmap(draw)(seeds)


@jax.jit
def _to_float(images):
    return jnp.clip(images * 0.5 + 0.5, 0, 1)


@jax.jit
def _to_uint8(images):
    """In 0 .. 255, and which images were finite, which these do not tell."""
    finite = jnp.isfinite(images).all(axis=(1, 2, 3))
    return jnp.round(_to_float(images) * 255).astype(jnp.uint8), finite


@partial(jax.jit, static_argnums=1)
def _resize_and_crop(images: Array, size: tuple[int, int]) -> Array:
    """Bilinear resize to cover `size`, without smoothing, then the middle: what diffusers does.

    Its rounding error that can lose a row is not repeated.
    """
    batch, height, width, channels = images.shape
    scale = max(size[0] / height, size[1] / width)
    shape = [max(s, int(side * scale)) for s, side in zip(size, (height, width), strict=True)]
    images = jax.image.resize(images, (batch, *shape, channels), "linear", antialias=False)
    top, left = (shape[0] - size[0]) // 2, (shape[1] - size[1]) // 2
    return images[:, top : top + size[0], left : left + size[1]]
