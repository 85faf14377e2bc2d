"""A request: the arguments of a call of SanaPipeline, checked and resolved once.

All checks raise UserError, a ValueError, naming the argument.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, UInt32, UInt64

from sana_jax.checkpoints.components import MASKS
from sana_jax.diffusion import dpm_solver
from sana_jax.models import buckets
from sana_jax.pipeline import tiling
from sana_jax.pipeline.facts import Facts
from sana_jax.pipeline.image_input import ImageInput
from sana_jax.pipeline.steps import Angles, Steps, refuse_second_half
from sana_jax.pipeline.tiling import LARGE, LARGE_TILE
from sana_jax.runtime.checks import (
    MAX_PICTURE_SEED,
    MAX_TEXT,
    BadArgument,
    choice,
    integer,
    listed,
    multiple,
    near,
    number,
    plain,
    truth,
)
from sana_jax.runtime.errors import UserError

OUTPUTS = ("pil", "np", "float", "latent")
DTYPES = ("float32", "bfloat16", "float16")
GUIDANCE_SCALE = 4.5  # unless told otherwise
MAX_SIDE = 2**16  # pixels

Tile = tuple[tiling.Size, tiling.Size]  # size, stride


class BadSide(BadArgument):
    """A height or width that is not a multiple of `step`; `near` names the nearest multiples."""

    def __init__(self, name: str, side: int, step: int):
        self.side, self.step, self.near = side, step, near(side, step)
        super().__init__(name, f"{side} is not a multiple of {step}: try {self.near}")


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """P prompts with `images_each` pictures each, B in total; only "auto" is resolved later."""

    prompts: list[str] | None  # None: embeddings and their mask are given
    embeddings: Float[Array, "P L T"] | None
    mask: Bool[Array, "P L"] | None
    negative_prompts: list[str]  # one for all, or one per prompt
    instruction: str | None  # "auto": the checkpoint's
    images_each: int
    height: int  # pixels that are sampled
    width: int
    crop: tuple[int, int] | None  # (height, width) that pictures are resized and cropped to
    tile: Tile | None  # None: decode the whole picture at once
    seeds: UInt64[np.ndarray, " B"] | None  # None: latents are given
    latents: Float[Array, "B h w c"] | Float[Array, "B steps h w c"] | None
    scale: Float32[np.ndarray, " P"]  # guidance scales
    interval: tuple[np.float32, np.float32] | None  # in sigma, where there is guidance
    unconditional_mask: str  # the text rows that the half without the prompt sees: one of MASKS
    sequential: bool  # compute the two halves of guidance one after the other
    is_sprint: bool
    steps: Steps  # all of them; with a start the last ones are run
    start: ImageInput | None  # None: noise alone

    @classmethod
    def of(
        cls,
        facts: Facts,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = "",
        height: int | None = None,
        width: int | None = None,
        num_steps: int | None = None,
        guidance_scale: float | Sequence[float] = GUIDANCE_SCALE,
        guidance_interval: tuple[float, float] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        latents: Float[Array, "B h w c"] | Float[Array, "B steps h w c"] | None = None,
        prompt_embeddings: Float[Array, "P L T"] | None = None,
        prompt_mask: Bool[Array, "P L"] | Int[Array, "P L"] | None = None,
        sampler: str | None = None,
        flow_shift: float | None = None,
        angles: Angles = None,
        instruction: str | None = "auto",
        use_resolution_binning: bool = False,
        sequential_guidance: bool = False,
        unconditional_mask: str | None = None,
        tile: Tile | str | None = "auto",
        image: Any = None,
        strength: float | None = None,
        mask: Any = None,
    ) -> "Request":
        """Makes a request from SanaPipeline's arguments, for a checkpoint with these facts."""
        binning = truth("use_resolution_binning", use_resolution_binning)
        each = integer("num_images_per_prompt", num_images_per_prompt, 1, 2**16)
        prompts, rows, count = _prompts(facts, prompt, prompt_embeddings, prompt_mask)
        steps = Steps.of(facts, num_steps, sampler, flow_shift, angles)
        start = ImageInput.of(image, strength, mask, count, facts.strength)
        if start is not None:
            if binning:
                raise UserError("use_resolution_binning is for sizes without an image: resize it")
            height, width = start.sides(height, width, facts.factor * facts.patch_size)
        height, width, crop = sizes(facts, height, width, binning)
        none = negative_prompt is None or listed(negative_prompt) == []
        negatives = texts("negative_prompt", "" if none else negative_prompt)
        if len(negatives) not in (1, count):
            raise UserError(f"{len(negatives)} negative prompts for {count} prompts")
        start = _with_picture(start, steps)
        sides = height // facts.factor, width // facts.factor
        if latents is not None:
            shape = count * each, *sides, facts.latent_channels
            if facts.is_sprint and np.ndim(latents) == 5:
                run = steps.num_steps if start is None else start.steps(steps.num_steps)
                shape = shape[0], run, *shape[1:]
            array("latents", latents, shape)
        if facts.is_sprint:
            refuse_second_half(
                negative_prompt=any(negatives),
                guidance_interval=guidance_interval is not None,
                sequential_guidance=sequential_guidance,
                unconditional_mask=unconditional_mask is not None,
            )
        return cls(
            prompts=prompts,
            embeddings=prompt_embeddings,
            mask=rows,
            negative_prompts=negatives,
            instruction=instruction_text(instruction),
            images_each=each,
            height=height,
            width=width,
            crop=crop,
            tile=tiles(facts.factor, tile, height, width),
            seeds=seeds(seed, count * each) if latents is None or facts.is_sprint else None,
            latents=latents,
            scale=per_prompt("guidance_scale", guidance_scale, count),
            interval=interval("guidance_interval", guidance_interval),
            unconditional_mask=_mask(facts, unconditional_mask),
            sequential=truth("sequential_guidance", sequential_guidance),
            is_sprint=facts.is_sprint,
            steps=steps,
            start=start,
        )

    @property
    def count(self) -> int:
        """The number of pictures, B."""
        return len(self.scale) * self.images_each

    def to_rows(self, x: Any) -> Any:
        """Repeats rows, one for all prompts or one per prompt, so that each picture has its own."""
        return x.repeat(self.count // len(x), axis=0)

    @property
    def schedule(self) -> dpm_solver.Schedule:
        """The steps that are run."""
        schedule = self.steps.schedule
        if self.start is None:
            return schedule
        return dpm_solver.last_steps(schedule, self.start.steps(self.steps.num_steps))

    @property
    def keys(self) -> UInt32[np.ndarray, "B 2"]:
        """The high and low words of the seeds."""
        return np.stack([self.seeds >> 32, self.seeds & 0xFFFFFFFF], axis=1).astype(np.uint32)

    @property
    def guided(self) -> bool:
        """True if any picture is guided; the others are then computed with both halves too."""
        return not self.is_sprint and bool((self.scale > 1).any())


def _with_picture(start: ImageInput | None, steps: Steps) -> ImageInput | None:
    """Returns the start, or None if the steps begin with noise alone: text to image."""
    if start is None or start.masks is not None or not steps.is_named:
        return start
    if start.strength < 1 and steps.angles and start.steps(steps.num_steps) == steps.num_steps:
        raise BadArgument(
            "strength",
            f"{start.strength:g} of {steps.num_steps} steps is all of them, which begin with noise"
            " alone: give less strength, more steps, or angles from below pi/2",
        )
    return None if start.strength == 1 else start


def sizes(
    facts: Facts, height: int | None, width: int | None, binning: bool
) -> tuple[int, int, tuple[int, int] | None]:
    """Returns (height, width) to sample at, and the size to resize and crop to, or None."""
    native = facts.native_size
    height = integer("height", native if height is None else height, 1, MAX_SIDE)
    width = integer("width", native if width is None else width, 1, MAX_SIDE)
    if not binning:
        step = facts.factor * facts.patch_size
        for name, side in ("height", height), ("width", width):
            if side % step:
                raise BadSide(name, side, step)
        return height, width, None
    bucket = buckets.nearest(height, width, native)
    return *bucket, (None if bucket == (height, width) else (height, width))


def tiles(factor: int, tile: Tile | str | None, height: int, width: int) -> Tile | None:
    """Returns (size, stride) for tiling.py, or None to decode the whole picture at once."""
    if isinstance(tile, str) and tile == "auto":
        return LARGE_TILE if height * width > LARGE else None
    if tile is None:
        return None
    pair = tuple(_size(each) for each in listed(tile) or ())
    if len(pair) != 2:
        raise UserError(f"tile {tile!r} is not a pair (size, stride) in pixels")
    for side in (side for size in tiling.check(pair[0], pair[1], factor) for side in size):
        # Else the strips of the tiles would not end where the picture does.
        multiple(f"tile {pair}: {side}", side, factor)
    return pair[0], pair[1]


def _size(value):
    """Returns a size of a tile, one number or two, as Python's numbers."""
    several = listed(value)
    return plain(value) if several is None else tuple(map(plain, several))


def _prompts(facts: Facts, prompt, embeddings, mask) -> tuple[list[str] | None, Array | None, int]:
    """Returns the prompts (None if embeddings replace them), the embeddings' mask, their number."""
    if prompt is not None:
        if embeddings is not None or mask is not None:
            raise UserError("give prompt or prompt_embeddings, not both")
        prompts = texts("prompt", prompt)
        return prompts, None, len(prompts)
    if embeddings is None:
        raise UserError("give a prompt, or prompt_embeddings and prompt_mask")
    shape = ("prompts", facts.text_rows, facts.caption_channels)
    count = array("prompt_embeddings", embeddings, shape).shape[0]
    return None, truths("prompt_mask", mask, (count, facts.text_rows)), count


def texts(name: str, value) -> list[str]:
    """Returns a text or a list of texts as a list."""
    value = plain(value)
    values = [value] if isinstance(value, str) else listed(value)
    if values is None or not all(isinstance(v, str) for v in values):
        raise UserError(f"{name} {value!r} is neither a text nor a list of texts")
    if not values:
        raise UserError(f"{name} is an empty list")
    if (longest := max(map(len, values))) > MAX_TEXT:
        raise UserError(f"{name} has {longest} characters: it takes up to {MAX_TEXT}")
    return [str(v) for v in values]


def _mask(facts: Facts, value: str | None) -> str:
    if value is None:
        return facts.unconditional_mask
    return choice("unconditional_mask", value, MASKS)


def instruction_text(value) -> str | None:
    """Checks that an instruction is a text ("auto" is one) or None."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"instruction {value!r} is neither a text nor None")
    if value is not None and len(value) > MAX_TEXT:
        raise UserError(f"instruction has {len(value)} characters: it takes up to {MAX_TEXT}")
    return value


def per_prompt(name: str, value, count: int) -> np.ndarray:
    """Returns one number per prompt, float32 (count,), from a single number or a list."""
    values = listed(value)
    if values is None:
        values = [number(name, value, -1e6, 1e6)] * count
    if len(values) != count:
        raise UserError(f"{name} {value!r} is neither a number nor {count} of them, one a prompt")
    return np.asarray([number(name, v, -1e6, 1e6) for v in values], np.float32)


def interval(name: str, value) -> tuple[np.float32, np.float32] | None:
    """Checks an interval (low, high) with low < high, or None."""
    if value is None:
        return None
    pair = listed(value) or ()
    if len(pair) != 2:
        raise UserError(f"{name} {value!r} is not a pair (low, high) of noise levels")
    low, high = (number(name, v, -1e6, 1e6) for v in pair)
    if not low < high:
        raise UserError(f"{name} {value!r}: low must be below high")
    return np.float32(low), np.float32(high)


def seeds(value, count: int) -> np.ndarray:
    """Returns uint64 (count,) from one seed an image, or from the first image's by counting up."""
    values = listed(value)
    if values is None:
        first = integer("seed", value, 0, MAX_PICTURE_SEED)
        values = [(first + i) % (MAX_PICTURE_SEED + 1) for i in range(count)]
    values = [integer("seed", seed, 0, MAX_PICTURE_SEED) for seed in values]
    if len(values) != count:
        raise UserError(f"{len(values)} seeds for {count} images")
    return np.asarray(values, np.uint64)


def truths(name: str, value, shape: tuple[int | str, ...]):
    """Checks a mask's shape and kind; returns whole numbers, which are 0 or 1, as truth values."""
    whole = "int" in str(getattr(value, "dtype", ""))
    array(name, value, shape, np.integer if whole else np.bool_)
    if whole and not bool(((value == 0) | (value == 1)).all()):
        raise UserError(f"{name} has other values than 0 and 1")
    return value.astype(np.bool_)


def array(name: str, value, shape: tuple[int | str, ...], kind=np.floating):
    """Checks an array's shape and kind.

    Integers must match; a name matches any size, the same size wherever it is repeated.
    """
    axes = ", ".join(map(str, shape))
    found = getattr(value, "shape", None)
    sizes = {}
    fits = found is not None and len(found) == len(shape)
    fits = fits and all(
        size == sizes.setdefault(axis, axis if isinstance(axis, int) else size)
        for size, axis in zip(found, shape, strict=True)
    )
    if not fits:
        raise UserError(f"{name} is {_describe(value)} instead of an array ({axes})")
    if 0 in found:
        raise UserError(f"{name} is empty: its shape is {_describe(value)}")
    bfloat16 = kind is np.floating and str(value.dtype) == "bfloat16"
    try:
        known = bfloat16 or np.issubdtype(value.dtype, kind)
    except TypeError:  # torch's
        known = False
    if not known:
        raise UserError(f"{name} holds {value.dtype} instead of {kind.__name__}")
    return value


def _describe(value) -> str:
    return str(getattr(value, "shape", type(value).__name__))
