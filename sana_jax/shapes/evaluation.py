"""Measures how well a model of `shapes` draws held-out prompts: evaluate --task=shapes.

Three kinds of pictures are parsed (parse.py) and scored (score.py): the model's; the ground truth
of the same prompts, which measures the parser; and the ground truth after the autoencoder, which is
the ceiling for the model. As a control, the model's pictures are scored against the prompt of
another picture with as many objects.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sana_jax import sharding
from sana_jax.batch.overlap import overlap
from sana_jax.batch.settings import with_usual
from sana_jax.batch.tasks import Batch, make_batches, make_tasks
from sana_jax.checkpoints.components import Checkpoint, component_dtype, module_for
from sana_jax.checkpoints.load import open_checkpoint, place_all
from sana_jax.checkpoints.loras import open_all
from sana_jax.metrics.reconstruction import to_uint8
from sana_jax.pictures import Picture, in_rows, make_grid, to_float
from sana_jax.pipeline.pipeline import SanaPipeline
from sana_jax.pipeline.steps import Angles, count_of
from sana_jax.runtime import checks
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.progress import Progress
from sana_jax.shapes import novel
from sana_jax.shapes.captions import Prompt, prompts
from sana_jax.shapes.draw import draw
from sana_jax.shapes.parse import Found, parse
from sana_jax.shapes.scene import COLOURS, HELD_OUT, MAX_OBJECTS
from sana_jax.shapes.score import KINDS, held_out, objects_by, overall_by, rates, score

GUIDANCE_SCALE = 2.0  # the best of 1.5, 2, 2.5 and 3 for the bundled model
COLUMNS, SHOWN = 8, 48  # pictures of the sheet
GOOD, BAD = (20, 150, 40), (220, 30, 30)  # frames in it
OF_DRAWING = "num_steps", "guidance_scale", "flow_shift", "angles", "lora"  # fields of Options


@dataclasses.dataclass(frozen=True)
class Options:
    """The settings that decide the figures besides the checkpoint."""

    count: int = 512  # prompts
    seed: int = 0  # of prompts, and of the first picture; the others count up from it
    num_steps: int | None = None  # None: the checkpoint's usual number
    guidance_scale: float | None = None  # None: GUIDANCE_SCALE, or Sana-Sprint's own
    flow_shift: float | None = None  # None: the checkpoint's
    angles: Angles = None  # of Sana-Sprint; None: by the number of steps
    batch_size: int = 16
    size: int = 128  # of what an autoencoder alone is tried on; else pictures have the native size
    dtype: str = "float32"
    variant: str | None = None
    revision: str | None = None
    lora: list[str] = dataclasses.field(default_factory=list)  # FILE or FILE:WEIGHT


@dataclasses.dataclass(frozen=True)
class Quiz:
    """A kind of prompts: those of a count and a seed, and what is known of them."""

    prompts: Callable[[int, int], list[Prompt]]
    colours: Mapping[str, tuple[float, float, float]]  # all that objects may have
    held_out: Collection[tuple[str, str]]  # combinations that no picture of the training has


USUAL = Quiz(prompts, COLOURS, HELD_OUT)
NOVEL = Quiz(novel.prompts, novel.COLOURS, novel.HELD_OUT)


def measure(name: str, options: Options, quiz: Quiz = USUAL) -> tuple[dict[str, Any], Picture]:
    """Returns a checkpoint's figures, for JSON, and a sheet of its first pictures.

    A checkpoint without a transformer or a text encoder draws nothing: figures that need its
    pictures are None, and the sheet shows reconstructions. Raises UserError.
    """
    checkpoint, draws = _open(name, options)
    vae, mesh, size = checkpoint.vae, sharding.make_mesh(), options.size
    if draws:
        pipe = SanaPipeline(checkpoint, mesh, options.dtype)
        size = pipe.native_size
    options = _resolved(options, draws and pipe.facts.is_sprint)
    loras = open_all(options.lora, checkpoint)
    checks.multiple(f"--size={size}", size, vae.factor)

    asked = quiz.prompts(options.count, options.seed)
    common = {"num_steps": options.num_steps, "guidance_scale": options.guidance_scale}
    if draws:
        given = {"flow_shift": options.flow_shift, "angles": options.angles}
        steps = pipe.request("", **given, **common).steps
    rows = [("--", {"prompt": each.text}) for each in asked]
    tasks = make_tasks(rows, common, options.seed, 1)
    batches = make_batches(tasks, options.batch_size, sharding.batch_divisor(mesh))

    place_all(checkpoint, name, options.dtype, mesh)
    if loras:
        pipe.set_loras(loras)
    apply = jax.jit(module_for(vae, component_dtype("vae", options.dtype)).apply)
    finite = []

    def rounded(images: jax.Array) -> jax.Array:
        finite.append(jnp.isfinite(images).all())  # which 8 bits do not tell
        return to_uint8(images)

    def check(does: str) -> None:
        if not all(finite):
            raise UserError(
                f"{name} {does} some pictures with NaN or infinite values: its weights are not"
                " those of a trained model, or need another --dtype"
            )

    def sample(batch: Batch) -> jax.Array:
        latents = pipe(
            [task.prompt for task in batch.padded()],
            seed=[task.seed for task in batch.padded()],
            flow_shift=steps.flow_shift,
            angles=options.angles,
            output="latent",
            **common,
        )
        return rounded(pipe.decode(latents))

    def reconstruct(batch: Batch) -> jax.Array:
        scenes = [asked[task.number].scene for task in batch.padded()]
        images = np.stack([draw(scene, size, size, quiz.colours) for scene in scenes])
        images = jax.device_put(images, sharding.batch_sharding(mesh))
        return rounded(apply({"params": checkpoint.params["vae"]}, to_float(images)))

    with (
        jax.set_mesh(mesh),
        jax.default_matmul_precision("float32" if options.dtype == "float32" else "default"),
        Progress(len(tasks) * (1 + draws), "image") as bar,
    ):
        restored, pictures = _parse_all(reconstruct, batches, quiz, bar.update)
        check("reconstructs")
        drawn = None
        if draws:
            drawn, pictures = _parse_all(sample, batches, quiz, bar.update)
            check("draws")
    exact = (draw(each.scene, size, size, quiz.colours) for each in asked)
    truth = [parse(picture, quiz.colours) for picture in exact]
    found = figures(asked, drawn, truth, restored, quiz.held_out) | {"pixels": size}
    found["flow_shift"] = steps.flow_shift if draws else None
    found["options"] = dataclasses.asdict(options)
    shown = drawn or restored
    good = [score(asked[k].facts, shown[k]).overall for k in range(len(pictures))]
    return found, _sheet(pictures, good)


def _open(name: str, options: Options) -> tuple[Checkpoint, bool]:
    """Returns a checkpoint and True, or the autoencoder of one that draws nothing and False."""
    checkpoint = open_checkpoint(name, variant=options.variant, revision=options.revision)
    if None not in (checkpoint.dit, checkpoint.text_encoder):
        return checkpoint, True
    if useless := [field for field in OF_DRAWING if getattr(options, field) not in (None, [])]:
        lacks = "a transformer" if checkpoint.dit is None else "a text encoder"
        raise UserError(f"--{useless[0]}: {name} lacks {lacks}, so it draws nothing")
    return dataclasses.replace(checkpoint, dit=None, text_encoder=None), False


def _resolved(options: Options, is_sprint: bool) -> Options:
    """Returns the options with the steps of the angles, and with a checkpoint's usual values."""
    if options.num_steps is None:
        options = dataclasses.replace(options, num_steps=count_of(options.angles))
    return with_usual(options, is_sprint, GUIDANCE_SCALE)


def _parse_all(
    dispatch: Callable[[Batch], jax.Array],
    batches: list[Batch],
    quiz: Quiz,
    update: Callable[[], Any],
) -> tuple[list[list[Found]], list[Picture]]:
    """Parses the picture of every task; also returns the first pictures."""
    found, pictures = {}, {}

    def keep(task, picture) -> None:
        found[task.number] = parse(np.asarray(picture), quiz.colours)
        if task.number < SHOWN:
            pictures[task.number] = np.array(picture)
        update()

    overlap(batches, dispatch, keep)
    return [found[k] for k in sorted(found)], [pictures[k] for k in sorted(pictures)]


def figures(
    asked: list[Prompt],
    drawn: list[list[Found]] | None,
    truth: list[list[Found]],
    restored: list[list[Found]],
    kinds: Collection[tuple[str, str]] = HELD_OUT,
) -> dict[str, Any]:
    """Turns the objects found in the prompts' pictures into figures for JSON.

    Args:
      drawn: objects in the model's pictures; None, and so the figures, without a model.
      truth: objects in pictures of the prompts' scenes.
      restored: objects in these pictures after the autoencoder.
      kinds: the combinations of shape and colour that are held out of the training.
    """

    def scored(found):
        return [score(each.facts, seen) for each, seen in zip(asked, found, strict=True)]

    parser, ceiling = scored(truth), scored(restored)
    found = dict.fromkeys(("overall", "overall_error", "facts", *KINDS))
    found |= dict.fromkeys(("by_objects", "by_style", "by_shape", "held_out", "control_shuffled"))
    if drawn is not None:
        scores = scored(drawn)
        found |= rates(scores) | {
            "by_objects": overall_by(scores, [each.facts["count"] for each in asked]),
            "by_style": overall_by(scores, [each.style for each in asked]),
            "by_shape": objects_by(scores, "shape"),
            "held_out": held_out(scores, kinds),
        }
        share = found["overall"]
        found["overall_error"] = math.sqrt(share * (1 - share) / len(asked))
        others = [another(k, len(asked)) for k in range(len(asked))]
        control = [score(asked[j].facts, drawn[k]) for k, j in enumerate(others) if j != k]
        found["control_shuffled"] = rates(control)["overall"]
    return found | {
        "prompts": len(asked),
        "parser_overall": rates(parser)["overall"],
        "parser": rates(parser),
        "ceiling": rates(ceiling)["overall"],
        "reconstruction": rates(ceiling),
        "reconstruction_by_objects": overall_by(ceiling, [each.facts["count"] for each in asked]),
        "reconstruction_by_shape": objects_by(ceiling, "shape"),
    }


def another(k: int, count: int) -> int:
    """Returns the next of `count` prompts with as many objects as prompt `k`, cyclically.

    The numbers of objects take turns.
    """
    return k + MAX_OBJECTS if k + MAX_OBJECTS < count else k % MAX_OBJECTS


def _sheet(pictures: list[Picture], good: list[bool]) -> Picture:
    """Frames the pictures: green if every stated fact is right, else red."""
    framed = []
    for picture, right in zip(pictures, good, strict=True):
        frame = np.full((*(side + 6 for side in picture.shape[:2]), 3), GOOD if right else BAD)
        frame[3:-3, 3:-3] = picture
        framed.append(frame.astype(np.uint8))
    return make_grid(in_rows(framed, COLUMNS))


def table(found: dict[str, Any]) -> str:
    """Formats the figures for people, in per cent."""
    names = ("overall", "facts", *KINDS)
    lines = [" " * 34 + "".join(f"{name:>9}" for name in names)]
    rows = {
        "the model": found,
        "its ceiling: reconstructed truth": found["reconstruction"],
        "the parser: truth": found["parser"],
        "the model, shuffled prompts": {"overall": found["control_shuffled"]},
    }
    for title, row in rows.items():
        lines.append(f"{title:34}" + "".join(_percent(row.get(name)) for name in names))
    titles = {
        "by_objects": "overall, objects",
        "by_style": "overall, style",
        "by_shape": "shape right",
        "held_out": "shape and colour right, held out",
        "reconstruction_by_objects": "ceiling, objects",
        "reconstruction_by_shape": "ceiling, shape right",
    }
    for key, title in titles.items():
        parts = (f"{name} {_percent(share).strip()}" for name, share in (found[key] or {}).items())
        if found[key]:
            lines.append(f"{title}: " + ", ".join(parts))
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return f"{'-':>9}" if share is None else f"{100 * share:9.1f}"
