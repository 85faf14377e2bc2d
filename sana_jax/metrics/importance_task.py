"""Measures the importance of a transformer's blocks: evaluate --task=importance.

Pictures of the prompts are drawn. Before every step the network is evaluated once more, with the
prompt, on the state that the sampler has reached; models/importance.py says what is measured.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from sana_jax import sharding
from sana_jax.batch import settings
from sana_jax.batch.tasks import Batch, Row, make_batches, make_tasks, read_rows
from sana_jax.checkpoints.load import open_checkpoint, place_all
from sana_jax.data.precomputed import weights_sha256
from sana_jax.diffusion.scm import pure_noise
from sana_jax.models.importance import MeasuredTransformer
from sana_jax.pipeline.denoise import keys_values_of
from sana_jax.pipeline.noise import noise_of
from sana_jax.pipeline.pipeline import SanaPipeline
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.progress import Progress
from sana_jax.shapes import captions

COUNT, GUIDANCE_SCALE = 100, 2.0  # prompts, as in the paper; unless told otherwise
SETTINGS = "prompt", "negative_prompt", "seed", "height", "width", "num_steps", "guidance_scale"


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything but the checkpoint that decides the figures."""

    prompts: str | None = None  # a file for batch/tasks.py; None: held-out prompts of shapes
    count: int = COUNT  # the first prompts of the file, or how many of shapes
    seed: int = 0  # of the first picture, and of the prompts of shapes
    num_steps: int | None = None  # None: the checkpoint's usual number
    guidance_scale: float | None = None  # None: GUIDANCE_SCALE, or Sana-Sprint's own
    flow_shift: float | None = None  # None: the checkpoint's
    batch_size: int = 16
    dtype: str = "float32"
    variant: str | None = None
    revision: str | None = None


def measure(name: str, options: Options) -> dict[str, Any]:
    """Returns the importance of the blocks of a checkpoint, and on what it was measured, for JSON.

    Raises UserError.
    """
    rows = rows_of(options)
    checkpoint = open_checkpoint(name, variant=options.variant, revision=options.revision)
    mesh = sharding.make_mesh()
    pipe = SanaPipeline(checkpoint, mesh, options.dtype)
    options = settings.with_usual(options, pipe.facts.is_sprint, GUIDANCE_SCALE)
    common = {"num_steps": options.num_steps, "guidance_scale": options.guidance_scale}
    tasks = make_tasks(rows, common, options.seed, 1)
    batches = make_batches(tasks, options.batch_size, sharding.batch_divisor(mesh))
    shared = settings.Options(name, out="", flow_shift=options.flow_shift)
    batches = settings.with_requests(batches, pipe, shared)

    sha256 = transformer_sha256(checkpoint)  # of the weights as they are stored
    place_all(checkpoint, name, options.dtype, mesh)
    total, evaluations = np.zeros(pipe.dit.config.depth), sum(task.num_steps for task in tasks)
    with Progress(evaluations, "evaluation") as bar:
        for batch in batches:
            total += _measure(pipe, batch, bar)
    importance = (total / evaluations).tolist()
    if not np.isfinite(importance).all():
        raise UserError(
            f"{name} computes NaN or infinite values: its weights are not those of a trained"
            " model, or need another --dtype"
        )
    found = checkpoint.instruction
    return {
        "checkpoint": name,
        "sha256": sha256,
        "depth": len(importance),
        "importance": importance,
        "prompts": len(tasks),
        "evaluations": evaluations,
        "options": dataclasses.asdict(options),
        "flow_shift": batches[0].request.steps.flow_shift,
        "instruction": found and found.sha256,
        "pictures": [{key: getattr(task, key) for key in SETTINGS} for task in tasks],
    }


def rows_of(options: Options) -> list[Row]:
    """Returns the first `count` prompts, with what their file says of them. Raises UserError."""
    if options.prompts is None:
        asked = captions.prompts(options.count, options.seed)
        return [("--", {"prompt": each.text}) for each in asked]
    rows = read_rows(options.prompts)[: options.count]
    for where, row in rows:
        if "image" in row:
            raise UserError(f"{where}image={row['image']}: importance is measured from noise alone")
    return rows


def transformer_sha256(checkpoint) -> str:
    """Returns a hash of the transformer's weights, the same for every layout and every copy."""
    return weights_sha256("transformer", checkpoint.params["dit"])


@partial(jax.jit, static_argnums=0)
def importance_of(
    module: nn.Module,
    params: Any,
    latents: Float[Array, "B h w c"],
    timestep: Float[Array, " 1"],
    keys_values: Float[Array, "depth B L C2"],
    mask: Bool[Array, "B L"],
    guidance: Float[Array, " B"] | None,
) -> Float[Array, "depth B"]:
    """Returns the importance of each block for one evaluation of each picture."""
    inputs = latents, timestep, keys_values, mask, guidance
    return module.apply({"params": params}, *inputs, method="importance")


def _measure(pipe: SanaPipeline, batch: Batch, bar: Progress) -> np.ndarray:
    """Returns the sum over a batch's pictures and steps, (depth,)."""
    request, params, config = batch.request, pipe.params["dit"], pipe.dit.config
    types = dict(dtype=pipe.dit.dtype, param_dtype=pipe.dit.param_dtype)
    module = MeasuredTransformer(config, implementation=pipe.dit.implementation, **types)
    rows, mask = pipe.encode_prompt(request.prompts)
    schedule = request.steps.schedule
    times = schedule.timestep * np.float32(config.timestep_scale)
    sides = request.height // pipe.factor, request.width // pipe.factor
    noise, _ = noise_of(request, (*sides, pipe.latent_channels))
    if request.is_sprint:
        noise = pure_noise(noise, schedule.sigma[0])
    guidance = request.scale if request.is_sprint else None
    state = jax.device_put(noise, sharding.batch_sharding(pipe.mesh))
    total = np.zeros(config.depth)
    with pipe.context():
        keys_values = keys_values_of(pipe.dit, params, rows[:, None])[:, :, 0]

    def after_step(step: int, latents: Array) -> None:
        nonlocal state
        with pipe.context():
            inputs = state, times[step : step + 1], keys_values, mask, guidance
            found = importance_of(module, params, *inputs)
        total[:] += np.asarray(found, np.float64)[:, : len(batch.tasks)].sum(axis=1)
        state = latents
        bar.update(len(batch.tasks))

    pipe(
        prompt_embeddings=rows,
        prompt_mask=mask,
        negative_prompt=request.negative_prompts,
        height=request.height,
        width=request.width,
        num_steps=request.steps.num_steps,
        guidance_scale=request.scale,
        seed=request.seeds,
        sampler=request.steps.sampler,
        flow_shift=request.steps.flow_shift,
        output="latent",
        on_step=after_step,
    )
    return total


def table(found: dict[str, Any]) -> str:
    """Formats the importance for people; rank 1 is the most important block."""
    numbers = found["importance"]
    order = sorted(range(len(numbers)), key=lambda i: -numbers[i])
    lines = ["block  importance  rank"]
    for i, number in enumerate(numbers):
        lines.append(f"{i:5}{number:12.5f}{order.index(i) + 1:6}")
    return "\n".join(lines)
