"""A checkpoint that draws for the demo's form: the files that `sample` writes, to the byte."""

import contextlib
import shlex
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from sana_jax import sharding
from sana_jax.batch.draw import open_pipeline
from sana_jax.batch.outputs import encode
from sana_jax.batch.overlap import wait
from sana_jax.batch.settings import Options, settings_of, shows_steps, with_requests
from sana_jax.batch.tasks import make_batches, make_tasks, with_defaults
from sana_jax.checkpoints.find import checkpoint_hash, find
from sana_jax.checkpoints.load import place_all
from sana_jax.checkpoints.loras import open_all
from sana_jax.pipeline.pipeline import NOT_FINITE
from sana_jax.pipeline.request import GUIDANCE_SCALE
from sana_jax.runtime import checks, devices
from sana_jax.runtime.errors import UserError

MOST = 8  # pictures at once: one batch of `sample`
FIELDS = "prompt negative_prompt seed num_steps guidance_scale width height".split()
OnStep = Callable[[int, int], None]  # steps that are done, and all


class Drawn(NamedTuple):
    file: str
    content: bytes  # of the PNG file
    settings: dict[str, Any]


class Studio:
    """A checkpoint with its weights on the devices. Threads may draw; they take turns."""

    def __init__(self, options: Options):
        """Loads what `options` names. Raises UserError."""
        folder = find(options.checkpoint, options.revision, options.variant)
        self._options, self._turn = options, threading.Lock()
        self._pipe = open_pipeline(str(folder), options)
        self._loras = open_all(options.lora, self._pipe.checkpoint)
        self._sha256 = checkpoint_hash(folder, options.variant)
        place_all(self._pipe.checkpoint, options.checkpoint, self._pipe.dtype, self._pipe.mesh)
        self._pipe.set_loras(self._loras)

    @property
    def form(self) -> dict[str, Any]:
        """What the page's form begins with."""
        facts = self._pipe.facts
        return {
            "checkpoint": self._options.checkpoint,
            "devices": devices.describe(),
            "num_steps": facts.num_steps,
            "guidance_scale": GUIDANCE_SCALE,
            "size": facts.native_size,
            "multiple": facts.factor * facts.patch_size,
            "is_sprint": facts.is_sprint,
            "most": MOST,
        }

    def draw(
        self, given: dict[str, Any], on_turn: Callable[[], None], on_step: OnStep
    ) -> list[Drawn]:
        """Draws the pictures that a form asks for.

        Args:
          given: values of FIELDS and `count`, those of `sample`'s flags; but for the prompt they
            may be missing.
          on_turn: called once nobody else is drawing.
          on_step: called after each step, where `sample` too takes one step at a time; what it
            raises ends the drawing.

        Raises UserError, naming the field that is wrong, and where a picture is not finite.
        """
        fields = [*FIELDS, "count"]
        if unknown := given.keys() - fields:
            raise UserError(
                f"{sorted(unknown)[0]!r:.60} is no field; there are {', '.join(fields)}"
            )
        count = checks.integer("count", given.get("count", 1), 1, MOST)
        row = {name: given[name] for name in FIELDS if given.get(name) is not None}
        if "prompt" not in row:
            raise UserError("prompt is missing")
        options, pipe = self._options, self._pipe
        tasks = make_tasks([("", row)], {"guidance_scale": GUIDANCE_SCALE}, 0, count)
        tasks = with_defaults(tasks, pipe.facts, options.max_pixels)
        batches = make_batches(tasks, options.batch_size, sharding.batch_divisor(pipe.mesh))
        (batch,) = batches = with_requests(batches, pipe, options)
        settings = settings_of(batches, pipe, options, self._sha256, self._loras)
        steps = len(batch.request.schedule.sigma)

        def show(step: int, latents: jax.Array) -> None:
            wait(latents)
            on_step(step + 1, steps)

        with self._turn, _memory_errors():
            on_turn()
            made = pipe.draw(batch.request, show if shows_steps(batches) else None)
            pictures, finite = map(np.asarray, made)
        if not finite[: len(tasks)].all():
            raise UserError(f"the pictures {NOT_FINITE}")
        return [
            Drawn(task.file, encode(picture, settings[task.file]), settings[task.file])
            for task, picture in zip(batch.tasks, pictures, strict=False)
        ]

    def command(self, given: dict[str, Any]) -> str:
        """Returns the command that draws the same pictures."""
        options = self._options
        flags = {"checkpoint": options.checkpoint, "variant": options.variant}
        flags |= {"revision": options.revision, "instruction_file": options.instruction_file}
        flags |= {"dtype": options.dtype, "clip_attention": options.clip_attention}
        if options.max_pixels != Options.max_pixels:
            flags["max_pixels"] = options.max_pixels
        flags |= {"out": "pictures"} | {name: given.get(name) for name in FIELDS}
        flags["num_images_per_prompt"] = given.get("count")
        flags = {name: value for name, value in flags.items() if value not in (None, "")}
        flags["prompt"] = given["prompt"]  # an empty one draws unconditionally
        words = [f"--{name}={value}" for name, value in flags.items()]
        words += [f"--lora={lora}" for lora in options.lora]
        words += ["--no_instruction"] * options.no_instruction
        return shlex.join(["python", "-m", "sana_jax.sample", *words])


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    with devices.memory_errors("fewer or smaller pictures, or --dtype=bfloat16"):
        yield
