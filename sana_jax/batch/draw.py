"""Draws many images into a folder; after an interrupted run, only the missing ones."""

import sys
import time

import jax

from sana_jax import sharding
from sana_jax.batch.inputs import with_inputs
from sana_jax.batch.outputs import OutputFolder
from sana_jax.batch.overlap import overlap, wait
from sana_jax.batch.settings import (
    Options,
    copied,
    extras_of,
    paths_of,
    settings_of,
    shows_steps,
    with_requests,
)
from sana_jax.batch.tasks import Batch, Task, make_batches, with_defaults
from sana_jax.checkpoints.find import checkpoint_hash, find
from sana_jax.checkpoints.load import open_checkpoint, place_all
from sana_jax.checkpoints.loras import Lora, open_all
from sana_jax.pipeline import tiling
from sana_jax.pipeline.pipeline import NOT_FINITE, SanaPipeline
from sana_jax.pipeline.request import Request
from sana_jax.pipeline.steps import count_of
from sana_jax.pipeline.tiling import LARGE
from sana_jax.runtime import devices
from sana_jax.runtime.devices import enable_compilation_cache
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.progress import Progress

HOPELESS = 16  # images that are not finite, where none is: the others will not be either


def draw(tasks: list[Task], options: Options) -> None:
    """Writes every task's picture to `options.out`, unless it is there already.

    Progress and a summary go to stderr. Raises UserError, if possible before anything is drawn or
    written.
    """
    tasks = with_inputs(tasks)
    folder = find(options.checkpoint, options.revision, options.variant)
    pipe = open_pipeline(str(folder), options)
    loras = open_all(options.lora, pipe.checkpoint)
    tasks = with_defaults(tasks, pipe.facts, options.max_pixels, count_of(options.angles))
    batches = make_batches(tasks, options.batch_size, sharding.batch_divisor(pipe.mesh))
    batches = with_requests(batches, pipe, options)
    sha256 = checkpoint_hash(folder, options.variant)
    wanted = settings_of(batches, pipe, options, sha256, loras)
    notes = {"checkpoint": options.checkpoint}
    extras = extras_of(tasks, wanted, notes)
    paths = paths_of(tasks)
    more = {file: paths.get(file, {}) | extras.get(file, {}) for file in wanted}
    with OutputFolder(options.out, wanted, notes, options.overwrite, options.grid, more) as out:
        if extras:
            print(copied(extras), file=sys.stderr)
        if out.missing:
            out.probe(3 * max(task.height * task.width for task in tasks))
            enable_compilation_cache(options.compilation_cache)
            _draw_missing(batches, pipe, loras, out, options)
        else:
            print(f"nothing to draw: {len(tasks)} of {len(tasks)} images are done", file=sys.stderr)
        if options.grid:
            out.write_grid()


def open_pipeline(name: str, options: Options) -> SanaPipeline:
    """Returns a run's pipeline; `checkpoints.load.place_all` reads its weights."""
    mesh = sharding.make_mesh()
    dtype = options.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    checkpoint = open_checkpoint(
        name,
        variant=options.variant,
        instruction_file=options.instruction_file,
        clip_attention=options.clip_attention,
        instruct=not options.no_instruction,
    )
    return SanaPipeline(checkpoint, mesh, dtype)


def _draw_missing(
    batches: list[Batch],
    pipe: SanaPipeline,
    loras: list[Lora],
    out: OutputFolder,
    options: Options,
):
    missing, start = out.missing, time.monotonic()
    count_missing = len(missing)
    count = sum(len(batch.tasks) for batch in batches)
    due = [batch for batch in batches if any(task.file in missing for task in batch.tasks)]
    # The largest first: where memory does not suffice, that is known before anything is drawn.
    due.sort(key=lambda batch: -_memory(batch.request, pipe))
    shapes = len({batch.tasks[0].shape for batch in due})
    bad: list[Task] = []
    progress = dict(total=count, initial=count - len(missing), unit="image")
    by_step = shows_steps(batches)
    if by_step:
        progress = dict(total=len(batches[0].request.schedule.sigma), unit="step")

    def dispatch(batch: Batch) -> tuple[jax.Array, jax.Array]:
        return pipe.draw(batch.request, show_step if by_step else None)

    def save(task: Task, made) -> None:
        pixels, finite = made
        if task.file in missing and not finite:
            bad.append(task)
            # A size that is hopeless is not to keep the others from being drawn.
            tried = len({task.shape for task in bad}) >= min(2, shapes)
            if len(out.missing) == count_missing and len(bad) >= HOPELESS and tried:
                raise UserError(_not_finite(bad))
        elif task.file in missing:
            out.save(task.file, pixels)
            if not by_step:
                with bar.get_lock():
                    bar.update()

    def show_step(step: int, latents: jax.Array) -> None:
        wait(latents)
        bar.update()

    largest = max(batch.size for batch in due)
    smaller = f"a --batch_size below {largest}, " if largest > 1 else ""
    others = "--dtype=bfloat16, --sequential_guidance, --tile=SIZE,STRIDE or smaller images"
    with devices.memory_errors(smaller + others), Progress(**progress) as bar:
        place_all(pipe.checkpoint, options.checkpoint, pipe.dtype, pipe.mesh)
        pipe.set_loras(loras)
        throughput = overlap(due, dispatch, save)
    if bad:
        raise UserError(_not_finite(bad))
    seconds = time.monotonic() - start
    images = f"{len(missing)} image{'s' * (len(missing) > 1)}"
    found = pipe.checkpoint.instruction
    told = f"; instruction {found.sha256[:12]} from {found.source}" if found else ""
    drawn = f"{images} in {seconds:.1f} s on {devices.describe()}"
    print(f"{drawn}; {throughput}{told}", file=sys.stderr)


def _memory(request: Request, pipe: SanaPipeline) -> int:
    """Returns the memory that a batch needs on a device, up to a common factor."""
    count = request.count // sharding.batch_divisor(pipe.mesh)
    height, width, tile = request.height, request.width, request.tile
    halves = 2 if request.guided and not request.sequential else 1
    (rows, columns), _ = tiling.check(*tile, pipe.factor) if tile else ((height, width), None)
    one = min(height, rows) * min(width, columns)
    decoded = max(one, min(count * one, LARGE))  # at once
    # By XLA's account of 1.6B a pixel takes eleven times as much when it is decoded.
    return max(11 * decoded, count * halves * height * width)


def _not_finite(tasks: list[Task]) -> str:
    one = tasks[0]
    return (
        f"{len(tasks)} images, such as {one.file} of {one.width} x {one.height} pixels, are not"
        f" saved: they {NOT_FINITE}"
    )
