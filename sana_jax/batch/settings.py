"""The options of a run, and all that decides the pixels of each of its pictures."""

import dataclasses
from typing import Any

import jax

from sana_jax import arguments
from sana_jax.batch.tasks import Batch
from sana_jax.pipeline import SanaPipeline


@dataclasses.dataclass(frozen=True)
class Options:
    """What all images of a run share; the flags of sample.py have the same names."""

    checkpoint: str
    out: str
    dtype: str | None = None  # None: bfloat16, on a CPU float32
    variant: str | None = None
    revision: str | None = None
    instruction_file: str | None = None
    no_instruction: bool = False
    guidance_interval: tuple[float, float] | None = None
    sampler: str = "flow_dpm_solver"
    flow_shift: float | None = None  # None: the checkpoint's
    use_resolution_binning: bool = False
    sequential_guidance: bool = False
    tile: tuple[int, int] | str | None = "auto"
    clip_attention: bool | None = None  # None: the checkpoint's
    batch_size: int = 8  # images
    max_pixels: int = 4096 * 4096
    overwrite: bool = False
    grid: bool = False
    compilation_cache: str | None = None  # None: the default; "": none


def settings_of(
    batches: list[Batch], pipe: SanaPipeline, options: Options, checkpoint_sha256: str
) -> dict[str, dict[str, Any]]:
    """file -> all that decides its pixels, in the order of the tasks. Raises UserError."""
    shared = _shared(pipe, options) | {"checkpoint_sha256": checkpoint_sha256}
    shared["step_by_step"] = shows_steps(batches)
    owns = [(task, batch.size) for batch in batches for task in batch.tasks]
    owns.sort(key=lambda own: own[0].number)
    tiles = tiles_of({(task.height, task.width) for task, _ in owns}, pipe, options)
    names = "prompt negative_prompt seed height width num_steps guidance_scale".split()
    return {
        task.file: {name: getattr(task, name) for name in names}
        | {"tile": tiles[task.height, task.width], "batch_size": size}
        | shared
        for task, size in owns
    }


def tiles_of(sizes: set[tuple[int, int]], pipe: SanaPipeline, options: Options) -> dict:
    """(height, width) -> size and stride of the tiles that the pipeline decodes it in, or None."""
    tiles = {}
    for size in sorted(sizes):
        height, width, _ = pipe._sizes(*size, options.use_resolution_binning)
        tiles[size] = pipe._tile(options.tile, height, width)
    return tiles


def _shared(pipe: SanaPipeline, options: Options) -> dict[str, Any]:
    instruction = pipe.checkpoint.instruction
    shift = pipe.checkpoint.flow_shift if options.flow_shift is None else options.flow_shift
    return {
        "guidance_interval": options.guidance_interval,
        "sampler": options.sampler,
        "flow_shift": arguments.number("--flow_shift", shift, 1e-3, 1e3),
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
    """Whether to show each step of a run that is slow, and has one batch: so no other progress."""
    return jax.default_backend() == "cpu" and len(batches) == 1
