"""SanaPipeline: text -> embeddings -> latents -> pixels, jitted, sharded over a mesh."""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float
from PIL import Image

from sana_jax import checkpoints, denoise, sharding, text
from sana_jax.checkpoints import diffusers, native
from sana_jax.checkpoints.components import CONFIGS, Checkpoint, component_dtype, module_for
from sana_jax.data import buckets
from sana_jax.diffusion import dpm_solver
from sana_jax.errors import UserError
from sana_jax.models import tiling

OUTPUTS = ("pil", "np", "float", "latent", "device")
DTYPES = ("float32", "bfloat16", "float16")
MAX_SEED = 2**32 - 1  # jax.random.key keeps 32 bits

# Pixels above which pictures are decoded in tiles unless told otherwise, and of what size: those
# that the reference recommends for 4096 px. Smaller ones show their seams in flat areas.
LARGE, LARGE_TILE = 2048 * 2048, (1024, 896)

Tile = tuple[tiling.Size, tiling.Size]  # size, stride


class SanaPipeline:
    """Draws images from prompts. Stateless: what a call gives depends on its arguments alone."""

    def __init__(self, checkpoint: Checkpoint, mesh: Mesh, dtype: str = "bfloat16"):
        """`checkpoint` as `checkpoints.load` gives it, with its weights on `mesh`."""
        if missing := CONFIGS.keys() - checkpoint.configs():
            raise UserError(f"the checkpoint lacks {', '.join(sorted(missing))}: it draws nothing")
        self.checkpoint, self.mesh, self.dtype = checkpoint, mesh, dtype
        self.dit, self.vae, self.text_encoder = (
            module_for(getattr(checkpoint, name), component_dtype(name, dtype)) for name in CONFIGS
        )
        self.params = checkpoint.params

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        dtype: str = "bfloat16",
        mesh: Mesh | None = None,
        variant: str | None = None,
        revision: str | None = None,
        instruction_file: str | None = None,
    ) -> "SanaPipeline":
        """Loads a native or diffusers folder, a bundled model or a hub id.

        Args:
          name: the folder, the bundled name, or org/name.
          dtype: "float32", "bfloat16" or "float16", of weights and activations.
          mesh: of sharding.make_mesh; None: this host's devices, the batch split over them.
          variant: of the weight files in a diffusers folder, such as "bf16".
          revision: branch, tag or commit on the hub.
          instruction_file: the complex human instruction, where the checkpoint does not hold it.

        Raises UserError, a ValueError, that says what is wrong with the checkpoint.
        """
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        mesh = mesh or sharding.make_mesh()
        checkpoint = checkpoints.load(
            name,
            dtype,
            mesh,
            variant=variant,
            revision=revision,
            instruction_file=instruction_file,
        )
        return cls(checkpoint, mesh, dtype)

    def save_pretrained(self, path: str | Path, format: str = "native") -> None:
        """Writes a folder that from_pretrained reads; "diffusers": one that diffusers reads too."""
        formats = {"native": native.save, "diffusers": diffusers.save}
        if format not in formats:
            raise UserError(f"format {format!r} is not one of {', '.join(formats)}")
        formats[format](self.checkpoint, Path(path))

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
          guidance_interval: (low, high) in sigma; guide only inside.
          seed: 0 .. 2**32 - 1; one an image, or the first image's, which the others count up from.
          latents: the noise to start from, float32; overrides `seed`.
          prompt_embeddings, prompt_mask: as `encode_prompt` gives them, instead of prompts.
          sampler: "flow_dpm_solver" or "flow_euler".
          flow_shift: None: the checkpoint's.
          instruction: "auto": the checkpoint's own; None: none; or the text.
          use_resolution_binning: sample at the nearest published size, then resize and crop.
          on_step: called as on_step(step, latents) after every step; slower than without.
          output: "pil", "np" (uint8 B H W 3), "float" (float32 in [0, 1]), "latent", or "device":
            as "np", but a jax array that is not waited for.
          sequential_guidance: the halves of guidance one after the other, in half the memory.
          tile: as in `decode`; "auto": above 2048 x 2048 pixels in tiles of 1024, else at once.

        Raises UserError, a ValueError, where an argument is out of range.
        """
        height, width, crop = self._sizes(height, width, use_resolution_binning)
        if not (isinstance(num_steps, int) and 1 <= num_steps <= 1000):
            raise UserError(f"num_steps {num_steps!r} is not a whole number in 1 .. 1000")
        scale = np.asarray(guidance_scale, np.float32)
        if not np.isfinite(scale).all():
            raise UserError(f"guidance_scale {guidance_scale} is not finite")
        if sampler not in dpm_solver.SAMPLERS:
            raise UserError(f"sampler {sampler!r} is not one of {', '.join(dpm_solver.SAMPLERS)}")
        if output not in OUTPUTS:
            raise UserError(f"output {output!r} is not one of {', '.join(OUTPUTS)}")
        shift = self.checkpoint.flow_shift if flow_shift is None else flow_shift
        if not (np.isfinite(shift) and shift > 0):
            raise UserError(f"flow_shift {shift} is not a positive number")

        if prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            if prompt_embeddings is not None or prompt_mask is not None:
                raise UserError("give prompts or prompt_embeddings, not both")
            prompt_embeddings, prompt_mask = self.encode_prompt(prompts, instruction)
        elif prompt_embeddings is None or prompt_mask is None:
            raise UserError("give a prompt, or prompt_embeddings and prompt_mask")
        count = prompt_embeddings.shape[0]
        captions, masks = prompt_embeddings[:, None], prompt_mask[:, None]  # (B, 1, L, T)
        if scale.shape not in ((), (count,)):
            raise UserError(f"{scale.size} guidance scales for {count} prompts")
        if (scale > 1).any():
            negative = self._negative(negative_prompt, count)
            captions = jnp.concatenate([negative[0][:, None], captions], axis=1)
            masks = jnp.concatenate([negative[1][:, None], masks], axis=1)
        captions = jnp.repeat(captions, num_images_per_prompt, axis=0)
        masks = jnp.repeat(masks, num_images_per_prompt, axis=0)
        scale = np.broadcast_to(np.maximum(scale, 1), count).repeat(num_images_per_prompt)
        count *= num_images_per_prompt

        shape = (height // self.factor, width // self.factor, self.latent_channels)
        noise = self._noise(seed, latents, count, shape)
        schedule = dpm_solver.SAMPLERS[sampler](num_steps, float(shift))
        interval = None if guidance_interval is None else tuple(map(np.float32, guidance_interval))
        scale = scale[:, None, None, None]
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
        if tile == "auto":
            tile = LARGE_TILE if height * width > LARGE else None
        images = self._decode_padded(latents, tile)
        if crop is not None:
            images = _resize_and_crop(images, crop)
        images = (_to_float if output == "float" else _to_uint8)(images)[:count]
        if output in ("float", "device"):
            return images
        images = np.asarray(images)
        return [Image.fromarray(image) for image in images] if output == "pil" else images

    def encode_prompt(
        self, prompts: str | Sequence[str], instruction: str | None = "auto"
    ) -> tuple[Float[Array, "B L T"], Bool[Array, "B L"]]:
        """The text encoder's rows in float32 and which of them count; hidden rows are zeros."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise UserError("the list of prompts is empty")
        if instruction == "auto":
            found = self.checkpoint.instruction
            instruction = found and found.text
        tokenized = text.tokenize(
            self.checkpoint.tokenizer, prompts, self.checkpoint.text_rows, instruction
        )
        tokens, mask = self._spread(tokenized.tokens), self._spread(tokenized.mask)
        with self._context():
            params = self.params["text_encoder"]
            rows = _encode_text(self.text_encoder, params, tokens, tokenized.window, mask)
        return rows[: len(prompts)], mask[: len(prompts)]

    def velocity(
        self,
        latents: Float[Array, "B h w c"],
        timestep: Float[Array, " B"],
        embeddings: Float[Array, "B L T"],
        mask: Bool[Array, "B L"],
    ) -> Float[Array, "B h w c"]:
        """The network once, without guidance; `timestep` in 0 .. 1000, used as given."""
        timestep = jnp.broadcast_to(jnp.asarray(timestep, jnp.float32), latents.shape[:1])
        inputs = [self._spread(x) for x in (latents, timestep, embeddings, mask)]
        with self._context():
            return _velocity(self.dit, self.params["dit"], *inputs)[: latents.shape[0]]

    def decode(
        self, latents: Float[Array, "B h w c"], tile: Tile | None = None
    ) -> Float[Array, "B H W 3"]:
        """Pixels in [-1, 1], not clamped, from the sampler's latents (which it unscales).

        `tile`: (size, stride) in pixels, for pictures too large to decode at once.
        """
        return self._decode_padded(self._spread(latents), tile)[: latents.shape[0]]

    def encode(
        self, images: Float[Array, "B H W 3"], tile: Tile | None = None
    ) -> Float[Array, "B h w c"]:
        """Latents as the sampler sees them (scaled), from pixels in [-1, 1]."""
        run = partial(_encode, self.vae, self.params["vae"])
        padded = self._spread(images)
        with self._context():
            if tile is None:
                self._check_multiple(*images.shape[1:3])
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
        run = partial(_decode, self.vae, self.params["vae"])
        with self._context():
            if tile is None:
                return run(latents)
            return tiling.tiled_decode(run, latents, *tile, self.factor)

    def _negative(self, negative_prompt: str | Sequence[str], count: int):
        """Rows and mask of the negative prompts, which get no instruction."""
        if isinstance(negative_prompt, str):
            rows, mask = self.encode_prompt([negative_prompt], None)
            return jnp.repeat(rows, count, axis=0), jnp.repeat(mask, count, axis=0)
        if len(negative_prompt) != count:
            raise UserError(f"{len(negative_prompt)} negative prompts for {count} prompts")
        return self.encode_prompt(negative_prompt, None)

    def _noise(self, seed, latents, count: int, shape: tuple[int, ...]) -> Array:
        if latents is not None:
            if latents.shape != (count, *shape):
                raise UserError(f"latents are {latents.shape} instead of {(count, *shape)}")
            return jnp.asarray(latents, jnp.float32)
        if isinstance(seed, int | np.integer):
            seeds = [(int(seed) + i) % (MAX_SEED + 1) for i in range(count)]
            wrong = [seed] if not 0 <= seed <= MAX_SEED else []
        else:
            seeds = list(seed)
            wrong = [s for s in seeds if not isinstance(s, int | np.integer)]
            wrong = wrong or [s for s in seeds if not 0 <= s <= MAX_SEED]
        if wrong:
            raise UserError(f"seed {wrong[0]!r} is not a whole number in 0 .. {MAX_SEED}")
        if len(seeds) != count:
            raise UserError(f"{len(seeds)} seeds for {count} images")
        return _draw(np.asarray(seeds, np.uint32), shape)

    def _sizes(self, height, width, binning: bool):
        """(height, width) to sample at, and the size to resize and crop to, or None."""
        native = self.native_size
        height, width = native if height is None else height, native if width is None else width
        for name, value in ("height", height), ("width", width):
            if not isinstance(value, int | np.integer) or value <= 0:
                raise UserError(f"{name} {value!r} is not a positive whole number of pixels")
        if not binning:
            self._check_multiple(height, width)
            return height, width, None
        bucket = buckets.nearest(height, width, native)
        return *bucket, (None if bucket == (height, width) else (height, width))

    def _check_multiple(self, height: int, width: int) -> None:
        step = self.factor * self.checkpoint.dit.patch_size
        for name, value in ("height", height), ("width", width):
            if value % step:
                low = value // step * step
                near = f"{low} or {low + step}" if low else str(step)
                raise UserError(f"{name} {value} is not a multiple of {step}: try {near}")

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
        precision = "float32" if self.dtype == "float32" else None
        with jax.set_mesh(self.mesh), jax.default_matmul_precision(precision):
            yield


@partial(jax.jit, static_argnums=0)
def _encode_text(module: nn.Module, params: Any, tokens, window, mask):
    return text.gather_window(module.apply({"params": params}, tokens), window, mask)


@partial(jax.jit, static_argnums=0)
def _velocity(module: nn.Module, params: Any, latents, timestep, captions, mask):
    return module.apply({"params": params}, latents, timestep, captions, mask)


@partial(jax.jit, static_argnums=0)
def _decode(module: nn.Module, params: Any, latents):
    latents = latents / module.config.scaling_factor
    return module.apply({"params": params}, latents, method="decode")


@partial(jax.jit, static_argnums=0)
def _encode(module: nn.Module, params: Any, images):
    latents = module.apply({"params": params}, images, method="encode")
    return latents * module.config.scaling_factor


@partial(jax.jit, static_argnums=1)
def _draw(seeds, shape: tuple[int, ...]):
    """Standard normal noise, each image from its own key."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


@jax.jit
def _to_float(images):
    return jnp.clip(images * 0.5 + 0.5, 0, 1)


@jax.jit
def _to_uint8(images):
    return jnp.round(_to_float(images) * 255).astype(jnp.uint8)


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
