"""The programs whose cost `compile` estimates: the pipeline's and the trainings'. Nothing runs.

Arguments are abstract and live on a mesh whose devices need not exist.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from sana_jax.checkpoints.components import abstract_placed, module_for
from sana_jax.diffusion import dpm_solver, scm
from sana_jax.measure.inputs import halves
from sana_jax.metrics import lpips
from sana_jax.models import flops
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.models.dit import SanaConfig
from sana_jax.pipeline import denoise, request
from sana_jax.pipeline.programs import decode_latents, predict_velocity
from sana_jax.runtime import checks
from sana_jax.runtime.errors import UserError
from sana_jax.sharding import batch_divisor, batch_sharding

DTYPE = "bfloat16"  # of weights and activations in drawing
TEXT_ROWS, FLOW_SHIFT = 300, 3.0  # of the released pipelines


@dataclasses.dataclass(frozen=True)
class Program:
    """A function, and the arguments to compile it for."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]  # ShapeDtypeStructs with shardings
    batch: int  # pictures on all chips together
    size: int  # their side in pixels
    flops: float | None  # of one call on all chips, as flops.py counts; None: not counted
    calls: int = 1  # calls that a picture takes
    steps: int | None = None  # of sampling in a call
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of jax.jit


def drawing(
    what: str,
    dit: SanaConfig,
    vae: DCAEConfig,
    mesh: Mesh,
    batch: int,
    size: int | None = None,
    steps: int = 20,
    implementation: str = "auto",
) -> Program:
    """Returns the program of `what`, "forward", "sample" or "decode", with bfloat16 weights.

    `batch` counts the pictures of all chips; a `size` of None is the native one. As in the
    pipeline, pictures above 2048 x 2048 pixels are decoded in tiles, with one call for each tile.
    Raises UserError if the size does not divide into latents.
    """
    size = dit.sample_size * vae.factor if size is None else size
    checks.multiple(f"--size={size}", size, vae.factor * dit.patch_size)
    rows = partial(_array, sharding=batch_sharding(mesh))
    if what == "decode":
        return _decode(vae, mesh, rows, batch, size)
    side = size // vae.factor
    latents = rows((batch, side, side, dit.latent_channels))
    module = module_for(dit, DTYPE, implementation=implementation)
    params = abstract_placed(dit, DTYPE, mesh)
    count = batch * flops.trunk(dit, side, side, TEXT_ROWS)
    if what == "forward":
        captions = rows((batch, TEXT_ROWS, dit.caption_channels))
        inputs = latents, rows((batch,)), captions, rows((batch, TEXT_ROWS), bool)
        inputs += (rows((batch,)),) if dit.is_sprint else ()
        function = partial(predict_velocity, module)
        return Program(function, (params, *inputs), batch, size, count)

    # "sample": rows without and with the prompt, guided at every step; or Sprint, with the prompt.
    def sample(params, noise, schedule, captions, masks, scale, fresh):
        inputs = noise, schedule, captions, masks, scale
        return denoise.sample(module, params, *inputs, None, sequential=False, fresh=fresh)

    schedule, fresh, number = dpm_solver.flow_dpm_solver(steps, FLOW_SHIFT), None, halves(dit)
    if dit.is_sprint:
        schedule = scm.scm(scm.named_angles(None, steps))
        fresh = rows((batch, steps, *latents.shape[1:]))
    schedule = jax.tree.map(lambda x: _array(x.shape, x.dtype, NamedSharding(mesh, P())), schedule)
    captions = rows((batch, number, TEXT_ROWS, dit.caption_channels))
    masks, scale = rows((batch, number, TEXT_ROWS), bool), rows((batch, 1, 1, 1))
    inputs = latents, schedule, captions, masks, scale, fresh
    total = number * steps * count
    return Program(sample, (params, *inputs), batch, size, total, steps=steps)


def training(config: ConfigDict, mesh: Mesh, batch: int | None, phase: str | None) -> Program:
    """Returns the step of a recipe in configs/, with its optimizer, averages and losses.

    `batch` counts the pictures of all chips; None is the config's own. `phase` names a phase of an
    autoencoder's training; None is the first that it runs. Raises UserError if the config, phase or
    batch does not fit.
    """
    if "phases" in config:
        found = _autoencoder_training(config, mesh, batch, phase)
    elif "distillation" in config:
        found = _distillation(config, mesh, batch, phase)
    elif phase is not None:
        raise UserError(f"--phase={phase}: this config has no phases; leave it out")
    else:
        found = _text_to_image_training(config, mesh, batch)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, found.arguments[0])
    options = {"donate_argnums": 0, "out_shardings": (shardings, None)}
    return dataclasses.replace(found, options=options)


def _decode(vae: DCAEConfig, mesh: Mesh, rows, batch: int, size: int) -> Program:
    calls = 1
    if tile := request.tiles(vae.factor, "auto", size, size):
        whole, (size, stride) = size, tile
        calls = len(range(0, whole, stride)) ** 2  # a sliver at the edge counts as a tile
    side = size // vae.factor
    latents = rows((batch, side, side, vae.latent_channels))
    devices = batch_divisor(mesh)
    function = partial(decode_latents, module_for(vae, DTYPE), devices=devices)
    count = batch * flops.decode(vae, size, size)
    params = abstract_placed(vae, DTYPE, mesh)
    return Program(function, (params, latents), batch, size, count, calls)


def _distillation(config: ConfigDict, mesh: Mesh, batch: int | None, name: str | None) -> Program:
    from sana_jax.training.distillation.networks import make_task

    turns = ("student", "discriminator")[: 1 + bool(config.distillation.adversarial)]
    if name not in (None, *turns):
        raise UserError(f"--phase={name} is not one of {', '.join(turns)}")
    return _text_to_image_training(
        config, mesh, batch, make=make_task, turn=turns.index(name or turns[0])
    )


def _text_to_image_training(
    config: ConfigDict, mesh: Mesh, batch: int | None, **options: Any
) -> Program:
    from sana_jax.training.text_to_image.abstract import abstract_training
    from sana_jax.training.text_to_image.recipe import check_batches
    from sana_jax.training.text_to_image.start import stand_in

    if batch is not None:
        config = config.copy_and_resolve_references()
        config.recipe.batch_size = batch
    config = stand_in(config, mesh)
    check_batches(config, mesh)
    made = abstract_training(config, mesh, **options)
    batch = config.recipe.batch_size
    inputs = made.state, made.batch, *made.inputs
    return Program(made.step, inputs, batch, made.size, batch * made.flops)


def _autoencoder_training(
    config: ConfigDict, mesh: Mesh, batch: int | None, name: str | None
) -> Program:
    from sana_jax.training.autoencoder.discriminator import Discriminator
    from sana_jax.training.autoencoder.recipe import check_phase, read_phase
    from sana_jax.training.autoencoder.task import AutoencoderTask
    from sana_jax.training.state import on_mesh

    name = name or next(iter(config.run), None)
    if name not in config.phases:
        raise UserError(f"--phase={name} is not one of {', '.join(config.phases)}")
    try:
        network, dtype = DCAEConfig(**config.network.to_dict()), jnp.dtype(config.dtype)
    except (TypeError, ValueError) as error:
        raise UserError(f"--config: {error}") from None
    phase = read_phase(config.phases[name].to_dict(), f"config.phases.{name}")
    # The task, with an abstract state.
    phase = dataclasses.replace(phase, batch_size=batch or phase.batch_size)
    check_phase(name, phase, network, mesh)
    distance, weights = _perceptual(config.perceptual.name, dtype, mesh)
    model = DCAE(network, dtype, jnp.float32, remat=config.remat)
    discriminator = Discriminator(**config.discriminator, dtype=dtype)
    task = AutoencoderTask(model, discriminator, phase, distance)
    state, _ = on_mesh(lambda: task.init(jax.random.key(0)), mesh)
    size, count = phase.image_size, None
    images = _array((phase.batch_size, size, size, 3), "uint8", batch_sharding(mesh))
    # Forward and twice that backward. Other phases train a part, which is not counted.
    if phase.trainable == (".*",):
        once = flops.encode(network, size, size) + flops.decode(network, size, size)
        count = 3 * phase.batch_size * once
    inputs = state, {"image": images}, weights
    return Program(task.step, inputs, phase.batch_size, size, count)


def _perceptual(name: str, dtype, mesh: Mesh):
    """Returns (distance, weights) of a perceptual loss, without reading a file of weights."""
    from sana_jax.training.autoencoder.perceptual import STAND_INS, make_perceptual

    tower = name.removeprefix("lpips_")
    if name in STAND_INS or tower not in lpips.TOWERS:
        return make_perceptual(name, None, dtype)
    array = partial(_array, sharding=NamedSharding(mesh, P()))
    convs, heads, channels = {}, [], 3
    for layers in lpips.TOWERS[tower].slices:
        for conv in filter(None, layers):
            kernel = array((conv.size, conv.size, channels, conv.channels))
            convs[str(conv.index)] = kernel, array((conv.channels,))
            channels = conv.channels
        heads.append(array((channels,)))
    distance = partial(lpips.lpips, tower=tower, dtype=dtype)
    return distance, {"convs": convs, "heads": heads}


def _array(shape, dtype="float32", sharding=None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)
