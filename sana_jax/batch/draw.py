"""Draws many images into a folder, and of a run that was cut short only those that are missing."""

import contextlib
import dataclasses
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
from tqdm import tqdm

from sana_jax import checkpoints, compilation_cache, sharding
from sana_jax.batch.outputs import OutputFolder
from sana_jax.batch.overlap import overlap, wait
from sana_jax.batch.tasks import Batch, Task, make_batches, with_sizes
from sana_jax.checkpoints.fingerprint import fingerprint
from sana_jax.data import buckets
from sana_jax.errors import UserError
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


def draw(tasks: list[Task], options: Options) -> None:
    """Writes the picture of every task to `options.out`, where it is not there already.

    Progress and a summary go to stderr. Raises UserError; before anything is drawn or written,
    where the reason can be known by then.
    """
    folder = checkpoints.find(options.checkpoint, options.revision, options.variant)
    pipe = _open(str(folder), options)
    tasks = _with_sizes(tasks, pipe, options.use_resolution_binning, options.max_pixels)
    shared = _shared_settings(pipe, options) | {"checkpoint_sha256": fingerprint(folder)}
    wanted = {task.file: _own_settings(task) | shared for task in tasks}
    notes = {"checkpoint": options.checkpoint}
    with OutputFolder(options.out, wanted, notes, options.overwrite) as out:
        if out.missing:
            out.probe(3 * max(task.height * task.width for task in tasks))
            compilation_cache.enable(options.compilation_cache)
            _draw_missing(tasks, pipe, out, options)
        else:
            print(f"nothing to draw: {len(tasks)} of {len(tasks)} images are done", file=sys.stderr)
        if options.grid:
            out.write_grid()


def _open(name: str, options: Options) -> SanaPipeline:
    """The pipeline, its weights unread."""
    try:
        mesh = sharding.make_mesh()
    except (RuntimeError, AssertionError) as error:  # the latter: JAX_PLATFORMS=cuda without CUDA
        reason = (str(error).splitlines() or ["none of that kind"])[0]
        raise UserError(
            f"no device for JAX_PLATFORMS={jax.config.jax_platforms}: {reason}"
        ) from None
    dtype = options.dtype or ("float32" if _on_cpu() else "bfloat16")
    checkpoint = checkpoints.open_checkpoint(
        name, variant=options.variant, instruction_file=options.instruction_file
    )
    if options.no_instruction:
        checkpoint.instruction = None
    if options.clip_attention is not None:
        dit = dataclasses.replace(checkpoint.dit, clip_attention=options.clip_attention)
        checkpoint.dit = dit
    return SanaPipeline(checkpoint, mesh, dtype)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _with_sizes(tasks: list[Task], pipe, binning: bool, max_pixels: int) -> list[Task]:
    multiple = pipe.factor * pipe.checkpoint.dit.patch_size
    if binning:
        buckets.sampling_buckets(pipe.native_size)  # raises where the model has none
        multiple = None
    return with_sizes(tasks, pipe.native_size, multiple, max_pixels)


def _own_settings(task: Task) -> dict[str, Any]:
    names = "prompt negative_prompt seed height width num_steps guidance_scale".split()
    return {name: getattr(task, name) for name in names}


def _shared_settings(pipe: SanaPipeline, options: Options) -> dict[str, Any]:
    """With those of its own, all that decides the pixels of an image on one kind of device."""
    instruction, shift = pipe.checkpoint.instruction, options.flow_shift
    return {
        "guidance_interval": options.guidance_interval,
        "sampler": options.sampler,
        "flow_shift": float(pipe.checkpoint.flow_shift if shift is None else shift),
        "instruction_sha256": instruction and instruction.sha256,
        "use_resolution_binning": options.use_resolution_binning,
        "sequential_guidance": options.sequential_guidance,
        "tile": options.tile,
        "clip_attention": pipe.dit.config.clip_attention,
        "dtype": pipe.dtype,
        "variant": options.variant,
    }


def _draw_missing(tasks: list[Task], pipe: SanaPipeline, out: OutputFolder, options: Options):
    missing, start = out.missing, time.monotonic()
    batches = make_batches(tasks, options.batch_size, sharding.batch_divisor(pipe.mesh))
    due = [batch for batch in batches if any(task.file in missing for task in batch.tasks)]
    progress = dict(total=len(tasks), initial=len(tasks) - len(missing), unit=" image")
    by_step = _on_cpu() and len(batches) == 1  # and slow: so show more than the end
    if by_step:
        progress = dict(total=tasks[0].num_steps, unit=" step")

    def dispatch(batch: Batch) -> jax.Array:
        tasks = batch.padded()
        negative = [task.negative_prompt for task in tasks]
        return pipe(
            [task.prompt for task in tasks],
            negative_prompt=negative if len(set(negative)) > 1 else negative[0],
            seed=[task.seed for task in tasks],
            guidance_scale=[task.guidance_scale for task in tasks],
            height=tasks[0].height,
            width=tasks[0].width,
            num_steps=tasks[0].num_steps,
            guidance_interval=options.guidance_interval,
            sampler=options.sampler,
            flow_shift=options.flow_shift,
            use_resolution_binning=options.use_resolution_binning,
            sequential_guidance=options.sequential_guidance,
            tile=options.tile,
            on_step=show_step if by_step else None,
            output="device",
        )

    def save(task: Task, pixels) -> None:
        if task.file in missing:
            out.save(task.file, pixels)
            if not by_step:
                with bar.get_lock():
                    bar.update()

    def show_step(step: int, latents: jax.Array) -> None:
        wait(latents)
        bar.update()

    with _memory_errors(due[0].size), tqdm(**progress, disable=None) as bar:
        checkpoints.place_all(pipe.checkpoint, options.checkpoint, pipe.dtype, pipe.mesh)
        throughput = overlap(due, dispatch, save)
    seconds = time.monotonic() - start
    images = f"{len(missing)} image{'s' * (len(missing) > 1)}"
    print(f"{images} in {seconds:.1f} s; {throughput}", file=sys.stderr)


@contextlib.contextmanager
def _memory_errors(batch_size: int) -> Iterator[None]:
    """Makes a UserError of XLA's complaint about too little memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = re.search(r"\d[\d.]* ?(bytes|[KMGT]i?B?\b)", str(error))
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        raise UserError(
            "the device has too little memory"
            + (f", {limit} bytes" if limit else "")
            + (f", for the {needed[0]} asked for" if needed else "")
            + f"; try a --batch_size below {batch_size}, --dtype=bfloat16, --sequential_guidance,"
            " or smaller images"
        ) from error
