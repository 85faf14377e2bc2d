"""The options of a run, its requests to the pipeline, and the settings that decide a picture."""

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from sana_jax.batch import image_files
from sana_jax.batch.tasks import Batch, Task
from sana_jax.checkpoints.components import MASKS
from sana_jax.checkpoints.loras import Lora
from sana_jax.pipeline.facts import usual_steps
from sana_jax.pipeline.pipeline import SanaPipeline
from sana_jax.pipeline.request import GUIDANCE_SCALE, BadSide, Request
from sana_jax.pipeline.steps import Angles, Steps
from sana_jax.runtime.checks import BadArgument
from sana_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that all images of a run share, named like the flags of sample.py."""

    checkpoint: str
    out: str
    dtype: str | None = None  # None: bfloat16, on a CPU float32
    variant: str | None = None
    revision: str | None = None
    instruction_file: str | None = None
    lora: Sequence[str] = ()  # FILE or FILE:WEIGHT
    no_instruction: bool = False
    guidance_interval: tuple[float, float] | None = None
    sampler: str | None = None  # None: the checkpoint's
    flow_shift: float | None = None  # None: the checkpoint's
    angles: Angles = None  # of Sana-Sprint; None: by the number of steps
    use_resolution_binning: bool = False
    sequential_guidance: bool = False
    unconditional_mask: str | None = None  # None: the checkpoint's
    tile: tuple[int, int] | str | None = "auto"
    clip_attention: bool | None = None  # None: the checkpoint's
    batch_size: int = 8  # images
    max_pixels: int = 4096 * 4096
    overwrite: bool = False
    grid: bool = False
    compilation_cache: str | None = None  # None: the default; "": none


def with_usual(measured: Any, is_sprint: bool, guidance_scale: float) -> Any:
    """Returns the options of a measurement, in which None stands for a checkpoint's usual values.

    `guidance_scale` is the usual one of models that are not Sana-Sprint.
    """
    usual = GUIDANCE_SCALE if is_sprint else guidance_scale
    scale = usual if measured.guidance_scale is None else measured.guidance_scale
    steps = usual_steps(is_sprint) if measured.num_steps is None else measured.num_steps
    return dataclasses.replace(measured, num_steps=steps, guidance_scale=scale)


def with_requests(batches: list[Batch], pipe: SanaPipeline, options: Options) -> list[Batch]:
    """Gives every batch its request, which resolves sizes, tiles and defaults once.

    Raises UserError, naming the line or the flag.
    """
    return [dataclasses.replace(batch, request=_request(batch, pipe, options)) for batch in batches]


def _request(batch: Batch, pipe: SanaPipeline, options: Options) -> Request:
    tasks, first = batch.padded(), batch.tasks[0]
    files = [task.inputs for task in tasks if task.inputs]  # all have an image, or none
    masks = [each.mask for each in files if each.mask]
    try:
        return pipe.request(
            [task.prompt for task in tasks],
            negative_prompt=[task.negative_prompt for task in tasks],
            seed=[task.seed for task in tasks],
            guidance_scale=[task.guidance_scale for task in tasks],
            height=first.height,
            width=first.width,
            num_steps=first.num_steps,
            guidance_interval=options.guidance_interval,
            sampler=options.sampler,
            flow_shift=options.flow_shift,
            angles=options.angles,
            use_resolution_binning=options.use_resolution_binning,
            sequential_guidance=options.sequential_guidance,
            unconditional_mask=options.unconditional_mask,
            tile=options.tile,
            image=[each.image for each in files] or None,
            strength=first.strength,
            mask=masks or None,
        )
    except BadSide as error:
        raise UserError(
            f"{first.place_of(error.name)}{error.name}={error.side}: it must be a multiple of"
            f" {error.step}; try {error.near}"
        ) from None
    except BadArgument as error:
        raise UserError(f"{first.place_of(error.name)}{error}") from None


def settings_of(
    batches: list[Batch],
    pipe: SanaPipeline,
    options: Options,
    checkpoint_sha256: str,
    loras: Sequence[Lora] = (),
) -> dict[str, dict[str, Any]]:
    """Returns file -> the settings that decide its pixels, in the order of the tasks."""
    shared = _shared(pipe, options, batches[0].request.steps)
    shared["checkpoint_sha256"] = checkpoint_sha256
    shared["step_by_step"] = shows_steps(batches)
    if loras:  # a run without any has the settings that it had before there were some
        shared["loras"] = [[lora.sha256, lora.weight] for lora in loras]
    owns = [(task, batch) for batch in batches for task in batch.tasks]
    owns.sort(key=lambda own: own[0].number)
    names = "prompt negative_prompt seed height width num_steps guidance_scale".split()
    return {
        task.file: {name: getattr(task, name) for name in names}
        | {"tile": batch.request.tile, "batch_size": batch.size}
        | shared
        | _second_half(batch.request)
        | ({"angles": [*batch.request.steps.angles]} if batch.request.is_sprint else {})
        | ({**task.inputs.settings, "strength": task.strength} if task.inputs else {})
        for task, batch in owns
    }


def _second_half(request: Request) -> dict[str, str]:
    """Returns guidance's setting that others than the first pictures of this program have."""
    differs = request.guided and request.unconditional_mask != MASKS[0]
    return {"unconditional_mask": request.unconditional_mask} if differs else {}


def extras_of(
    tasks: list[Task], settings: Mapping[str, Any], notes: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Returns file -> the other fields of its prompt's line, for its line of the manifest.

    Raises UserError for one that the manifest uses itself.
    """
    own = {"file", "sha256", "key", *notes, *settings[tasks[0].file], *image_files.SETTINGS}
    for task in tasks:
        if taken := sorted(own & task.extras.keys()):
            raise UserError(
                f"{task.row[0]}{taken[0]} is a field of manifest.jsonl, and not read from prompts:"
                " give the flag of the name, where there is one, and rename this key"
            )
    return {task.file: task.extras for task in tasks if task.extras}


def paths_of(tasks: list[Task]) -> dict[str, dict[str, Any]]:
    """Returns file -> the paths of the picture and the mask that it starts from, for people."""
    return {
        task.file: {"image": task.image} | ({"mask": task.mask} if task.mask else {})
        for task in tasks
        if task.image
    }


def copied(extras: dict[str, dict[str, Any]]) -> str:
    """Returns a line that names the fields, which may be misspelt ones that were to decide."""
    names = sorted({reprlib.repr(name) for fields in extras.values() for name in fields})
    more = f" and {len(names) - 9} others" if names[9:] else ""
    return f"{', '.join(names[:9])}{more} of the prompts are copied into manifest.jsonl alone"


def _shared(pipe: SanaPipeline, options: Options, steps: Steps) -> dict[str, Any]:
    instruction = pipe.checkpoint.instruction
    return {
        "guidance_interval": options.guidance_interval,
        "sampler": steps.sampler,
        "flow_shift": steps.flow_shift,
        "instruction_sha256": instruction and instruction.sha256,
        "use_resolution_binning": options.use_resolution_binning,
        "sequential_guidance": options.sequential_guidance,
        "clip_attention": pipe.dit.config.clip_attention,
        "dtype": pipe.dtype,
        "variant": options.variant,
        "devices": pipe.mesh.size,
        "platform": jax.default_backend(),
        "device_kind": pipe.mesh.devices.flat[0].device_kind,
    }


def shows_steps(batches: list[Batch]) -> bool:
    """Returns True for a slow run of one batch, whose only progress is its steps."""
    return jax.default_backend() == "cpu" and len(batches) == 1
