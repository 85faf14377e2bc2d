"""SanaPipeline: a request -> embeddings -> latents -> pixels, sharded over a mesh."""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import Image

from sana_jax import sharding
from sana_jax.checkpoints import diffusers, native
from sana_jax.checkpoints.components import (
    CONFIGS,
    Checkpoint,
    check_fit,
    component_dtype,
    module_for,
)
from sana_jax.checkpoints.load import load
from sana_jax.diffusion import scm
from sana_jax.diffusion.flow_matching import interpolate
from sana_jax.diffusion.inpainting import Kept
from sana_jax.pictures import to_float
from sana_jax.pipeline import denoise, programs, tiling
from sana_jax.pipeline.adapters import WithLoras
from sana_jax.pipeline.facts import Facts
from sana_jax.pipeline.image_input import Pixels, redrawn_latents
from sana_jax.pipeline.noise import noise_of
from sana_jax.pipeline.placement import Placement
from sana_jax.pipeline.remembered import Remembered
from sana_jax.pipeline.request import (
    DTYPES,
    GUIDANCE_SCALE,
    OUTPUTS,
    Request,
    Tile,
    array,
    tiles,
    truths,
)
from sana_jax.pipeline.steps import Angles
from sana_jax.pipeline.texts import ReadsTexts
from sana_jax.runtime import checks
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import local, new_folder

NOT_FINITE = (
    "have NaN or infinite values: try another dtype, or clip_attention for weights that were"
    " trained in float16"
)


class SanaPipeline(WithLoras, ReadsTexts):
    """Draws images from prompts. The result of a call depends on its arguments alone.

    The text encoder's output for instructions and negative prompts is cached between calls, so make
    another pipeline for another text encoder's weights.

    Threads may share a pipeline: all its methods may run at once, with any arguments, and return
    what they return alone. They wait for one another where they tokenize. `on_step` is called on
    the thread of its own call. Memory is needed for all calls that run. What is not safe is to
    change `checkpoint`, `params` or the LoRAs while another thread draws. Processes cannot share
    one: in a fork JAX would wait for ever, so that a pipeline refuses to be used there.
    """

    def __init__(self, checkpoint: Checkpoint, mesh: Mesh, dtype: str = "bfloat16"):
        """`checkpoint`: the result of `checkpoints.load.load`, with its weights on `mesh`."""
        if missing := CONFIGS.keys() - checkpoint.configs():
            raise UserError(f"the checkpoint lacks {', '.join(sorted(missing))}: it draws nothing")
        check_fit(checkpoint)
        self.checkpoint, self.mesh, self.dtype = checkpoint, mesh, dtype
        self._place = Placement(mesh, dtype)
        self.dit, self.vae, self.text_encoder = (
            module_for(getattr(checkpoint, name), component_dtype(name, dtype)) for name in CONFIGS
        )
        self.params = checkpoint.params
        self.facts = Facts.of(checkpoint)
        self._prefixes, self._negatives = Remembered(), Remembered()

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
          dtype: of weights and activations, "float32", "bfloat16" or "float16"; beside a float16
            transformer the autoencoder and the text encoder are bfloat16.
          mesh: from sharding.make_mesh; None: this host's devices, the batch split over them.
          variant: of the weight files in a diffusers folder, such as "bf16".
          revision: branch, tag or commit on the hub.
          instruction_file: a file with the complex human instruction, for checkpoints without one.
          clip_attention: True for weights that were trained in float16 (Sana 1.0 without BF16 in
            its name) and run in another dtype; None: as the checkpoint says, else by dtype.

        Raises UserError, a ValueError, that says what is wrong with the checkpoint, and Retry if
        the hub does not answer.
        """
        checks.choice("dtype", dtype, DTYPES)
        if clip_attention is not None:
            clip_attention = checks.truth("clip_attention", clip_attention)
        mesh = sharding.make_mesh() if mesh is None else mesh
        sharding.check_mesh(mesh)
        checkpoint = load(
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
        """Writes a folder for from_pretrained; diffusers reads the "diffusers" format too.

        Raises UserError while LoRAs are loaded: sana_jax.convert merges them.
        """
        self.check_no_loras()
        formats = {"native": native.save, "diffusers": diffusers.save}
        checks.choice("format", format, formats)
        with new_folder(path := local(path)):
            formats[format](self.checkpoint, path)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_steps: int | None = None,
        guidance_scale: float | Sequence[float] = GUIDANCE_SCALE,
        guidance_interval: tuple[float, float] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        latents: Float[Array, "B h w c"] | Float[Array, "B steps h w c"] | None = None,
        prompt_embeddings: Float[Array, "B L T"] | None = None,
        prompt_mask: Bool[Array, "B L"] | Int[Array, "B L"] | None = None,
        sampler: str | None = None,
        flow_shift: float | None = None,
        angles: Angles = None,
        instruction: str | None = "auto",
        use_resolution_binning: bool = False,
        on_step: Callable[[int, Array], None] | None = None,
        output: str = "pil",
        sequential_guidance: bool = False,
        unconditional_mask: str | None = None,
        tile: Tile | str | None = "auto",
        image: Any = None,
        strength: float | None = None,
        mask: Any = None,
    ) -> list[Image.Image] | np.ndarray | Array:
        """Draws `num_images_per_prompt` images of every prompt, the images of a prompt together.

        Args:
          height, width: pixels, multiples of the autoencoder's factor; None: the native size.
          num_steps: evaluations of the network (pairs, under guidance); None: 20, for Sprint 2.
          negative_prompt, guidance_scale: one for all, or one per prompt; <= 1: no guidance.
          guidance_interval: (low, high) in sigma; guide only where low < sigma <= high.
          seed: 0 .. 2**64 - 1; one per image, or the first image's: the next images count up.
          latents: the noise to start from, float32 (Sprint: or of every step); overrides `seed`.
          prompt_embeddings, prompt_mask: from `encode_prompt`; the mask is of bools, or 0 and 1.
          sampler: "flow_dpm_solver" (None) or "flow_euler"; for Sprint "scm" (None).
          flow_shift, unconditional_mask: None: the checkpoint's; see pipeline/README.md.
          angles: of Sprint, falling to 0, or "paper" or "diffusers"; None: see diffusion/scm.py.
          instruction: "auto": the checkpoint's own; None: no instruction; or a text.
          use_resolution_binning: sample at the nearest published size, then resize and crop.
          on_step: called as on_step(step, latents) after every step; sampling is slower with it.
          output: "pil", "np" (uint8 B H W 3), "float" (float32 in [0, 1]) or "latent".
          sequential_guidance: compute the halves of guidance one after the other, in less memory.
          tile: as in `decode`; "auto": in tiles of 1024 above 2048 x 2048 pixels, else at once.
          image: to start from, one or one per prompt: PIL's, or uint8 (H, W, 3). Its size is drawn.
          strength: the share of steps, up to 1, that change the image; None: 0.6, Sprint 0.5.
          mask: white (255, True) where image is redrawn, 0 where it is kept; see image_input.py.

        NumPy's and JAX's scalars and lists are taken too. Raises UserError, a ValueError.
        """
        request = self.request(
            prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            latents=latents,
            prompt_embeddings=prompt_embeddings,
            prompt_mask=prompt_mask,
            sampler=sampler,
            flow_shift=flow_shift,
            angles=angles,
            instruction=instruction,
            use_resolution_binning=use_resolution_binning,
            sequential_guidance=sequential_guidance,
            unconditional_mask=unconditional_mask,
            tile=tile,
            image=image,
            strength=strength,
            mask=mask,
        )
        return self._deliver(request, on_step, output)

    def _deliver(self, request: Request, on_step, output: str):
        """Draws a request and returns it as `output` says."""
        checks.choice("output", output, OUTPUTS)
        if on_step is not None and not callable(on_step):
            raise UserError(f"on_step {on_step!r} cannot be called")
        if output == "latent":
            shown = None if request.start is None else request.start.read()
            return self._sample(request, on_step, shown)[: request.count]
        if output == "float":
            return programs.to_unit_range(self._paint(request, on_step))[: request.count]
        pictures, finite = self.draw(request, on_step)
        pictures = np.asarray(pictures)
        if not finite.all():
            bad = request.count - int(finite.sum())
            logging.warning("%d of %d images %s", bad, request.count, NOT_FINITE)
        return [Image.fromarray(picture) for picture in pictures] if output == "pil" else pictures

    def request(self, prompt: str | Sequence[str] | None = None, **arguments) -> Request:
        """Checks and resolves the arguments of a call, all but `on_step` and `output`.

        Raises UserError, a ValueError, if an argument is out of range.
        """
        self._place.check_process()
        return Request.of(self.facts, prompt, **arguments)

    def draw(
        self, request: Request, on_step: Callable[[int, Array], None] | None = None
    ) -> tuple[UInt8[Array, "B H W 3"], Bool[Array, " B"]]:
        """Draws uint8 pictures, and says which are finite: device arrays that may not be ready."""
        pictures, finite = programs.to_uint8(self._paint(request, on_step))
        return pictures[: request.count], finite[: request.count]

    def _paint(self, request: Request, on_step) -> Float[Array, "padded H W 3"]:
        """Returns pixels in about [-1, 1]."""
        shown = None if request.start is None else request.start.read()
        images = self._decode_padded(self._sample(request, on_step, shown), request.tile)
        if shown is not None and shown.masks is not None:
            return programs.composite(images, *(self._spread(request.to_rows(x)) for x in shown))
        return images if request.crop is None else programs.resize_and_crop(images, request.crop)

    def _sample(self, request: Request, on_step, shown) -> Float[Array, "padded h w c"]:
        captions, masks = self._read(request)
        sides = request.height // self.factor, request.width // self.factor
        noise, fresh = noise_of(request, (*sides, self.latent_channels))
        scale = request.scale if request.is_sprint else np.maximum(request.scale, 1)
        scale = scale.repeat(request.images_each)[:, None, None, None]
        schedule, kept = request.schedule, None
        noise, captions, masks, scale = map(self._spread, (noise, captions, masks, scale))
        if shown is not None:
            noise, kept = self._start(request, shown, noise, schedule.sigma[0])
        elif request.is_sprint:
            noise = scm.pure_noise(noise, schedule.sigma[0])
        run = denoise.sample
        if on_step is not None:
            run = partial(denoise.sample_slowly, lambda i, x: on_step(i, x[: request.count]))
        with self.context():
            return run(
                self.dit,
                self.params["dit"],
                noise,
                schedule,
                captions,
                masks,
                scale,
                request.interval,
                sequential=request.sequential,
                kept=kept,
                fresh=fresh if fresh is None else self._spread(fresh),
            )

    def _start(self, request, shown: Pixels, noise: Array, sigma) -> tuple[Array, Kept | None]:
        """Returns the pictures' latents with noise of level sigma, and what inpainting keeps."""
        several, pixels = sharding.batch_divisor(self.mesh), to_float(shown.pictures)
        vae = module_for(self.checkpoint.vae, jnp.float32)
        with jax.default_matmul_precision("float32"):
            groups = [  # of a picture on each device: their activations are large
                self._encode(vae, pixels[i : i + several], request.tile)
                for i in range(0, len(pixels), several)
            ]
        data = self._spread(request.to_rows(jnp.concatenate(groups)))
        noise = interpolate(data, noise, jnp.full(len(data), sigma))
        if shown.masks is None:
            return noise, None
        redrawn = self._spread(request.to_rows(redrawn_latents(shown.masks, self.factor)))
        return noise, Kept(data, redrawn)

    def velocity(
        self,
        latents: Float[Array, "B h w c"],
        timestep: Float[Array, " B"],
        embeddings: Float[Array, "B L T"],
        mask: Bool[Array, "B L"] | Int[Array, "B L"],
        guidance_scale: float = GUIDANCE_SCALE,
    ) -> Float[Array, "B h w c"]:
        """Evaluates the network once, without guidance; `timestep` in 0 .. 1000, used as given.

        The timesteps of Sprint are in 0 .. 1; only its network reads a guidance scale.
        """
        patch, rows = self.facts.patch_size, "text rows"
        batch = array("latents", latents, ("B", "h", "w", self.latent_channels)).shape[0]
        if latents.shape[1] % patch or latents.shape[2] % patch:
            raise UserError(f"latents {latents.shape} do not divide into patches of {patch}")
        embeddings_shape = (batch, rows, self.facts.caption_channels)
        rows = array("embeddings", embeddings, embeddings_shape).shape[1]
        mask = truths("mask", mask, (batch, rows))
        if np.ndim(timestep):
            array("timestep", timestep, (batch,), np.number)
        timestep = jnp.broadcast_to(jnp.asarray(timestep, jnp.float32), batch)
        inputs = [self._spread(x) for x in (latents, timestep, embeddings, mask)]
        if self.facts.is_sprint:
            scale = checks.number("guidance_scale", guidance_scale, -1e6, 1e6)
            inputs.append(jnp.full(1, scale, jnp.float32))
        with self.context():
            return programs.predict_velocity(self.dit, self.params["dit"], *inputs)[
                : latents.shape[0]
            ]

    def decode(
        self, latents: Float[Array, "B h w c"], tile: Tile | str | None = None
    ) -> Float[Array, "B H W 3"]:
        """Returns pixels in [-1, 1], not clamped, from the sampler's latents, which it unscales.

        `tile`: (size, stride) in pixels, for pictures too large to decode at once; "auto": as
        `__call__` does.
        """
        array("latents", latents, ("B", "h", "w", self.latent_channels))
        height, width = (side * self.factor for side in latents.shape[1:3])
        tile = tiles(self.factor, tile, height, width)
        return self._decode_padded(self._spread(latents), tile)[: latents.shape[0]]

    def encode(
        self, images: Float[Array, "B H W 3"], tile: Tile | str | None = None
    ) -> Float[Array, "B h w c"]:
        """Returns latents as the sampler sees them (scaled), from pixels in [-1, 1]."""
        channels = self.checkpoint.vae.in_channels
        array("images", images, ("B", "H", "W", channels))
        for name, side in zip(("height", "width"), images.shape[1:3], strict=True):
            checks.multiple(f"{name} {side}", side, self.factor)
        return self._encode(self.vae, images, tiles(self.factor, tile, *images.shape[1:3]))

    def _encode(self, vae: nn.Module, images, tile: Tile | None) -> Float[Array, "B h w c"]:
        run = partial(programs.encode_images, vae, self.params["vae"])
        padded = self._spread(images)
        with self.context():
            if tile is None:
                latents = run(padded)
            else:
                latents = tiling.tiled_encode(run, padded, *tile, self.factor)
        return latents[: images.shape[0]]

    @property
    def factor(self) -> int:
        """Pixels along a side of one latent."""
        return self.facts.factor

    @property
    def latent_channels(self) -> int:
        return self.facts.latent_channels

    @property
    def native_size(self) -> int:
        """The side, in pixels, of the pictures that the network was trained on."""
        return self.facts.native_size

    def _decode_padded(self, latents: Array, tile: Tile | None = None) -> Array:
        devices = sharding.batch_divisor(self.mesh)
        run = partial(programs.decode_latents, self.vae, self.params["vae"], devices=devices)
        with self.context():
            if tile is None:
                return run(latents)
            size, stride = tile
            return tiling.tiled_decode(run, latents, size, stride, self.factor)

    def _spread(self, x) -> Array:
        return self._place.spread(x)

    def context(self) -> contextlib.AbstractContextManager[None]:
        """Sets the mesh for the networks; with it float32 means float32 on every device."""
        return self._place.context()
