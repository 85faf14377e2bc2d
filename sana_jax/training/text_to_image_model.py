"""What a text-to-image training is made of, and the checkpoint that comes of it.

A config names checkpoints for what does not train; their weights stay in their folders, and the
training's checkpoints know these by fingerprint.
"""

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from sana_jax import arguments, flops, sharding, text
from sana_jax.checkpoints import find, native, open_checkpoint
from sana_jax.checkpoints.components import (
    Checkpoint,
    Config,
    abstract_params,
    abstract_placed,
    check_fit,
    module_for,
)
from sana_jax.checkpoints.fingerprint import fingerprint
from sana_jax.checkpoints.mapping import cast
from sana_jax.checkpoints.tensors import LazyArray
from sana_jax.checkpoints.training import read_newest
from sana_jax.diffusion.flow_matching import NoiseConfig
from sana_jax.errors import UserError
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.models.dit import REMAT, SanaConfig
from sana_jax.models.gemma2 import Gemma2Config
from sana_jax.training.loop import compile_step
from sana_jax.training.optimizers import OptimizerConfig, make_schedule, sqrt_scaled
from sana_jax.training.state import on_mesh
from sana_jax.training.text_to_image import CaptionWindow, Frozen, Recipe, TextToImageTask

AUTO_LR_BATCH = 256  # what learning rates are stated for, where config.auto_lr is "sqrt"
# Tokens of SANA's instruction by Gemma's tokenizer, about: only what is compiled ahead needs it.
INSTRUCTION_TOKENS = 240
READER = "text_encoder.network"


def open_base(config: ConfigDict) -> tuple[Checkpoint, dict[str, str]]:
    """The checkpoint that the training completes, and the fingerprints of where it is from.

    It lacks the weights of what trains. Raises UserError.
    """
    encoder, prints = config.text_encoder, {}
    opened: dict[str, Checkpoint] = {}

    def open_named(key: str, name: str, *parts: str) -> Checkpoint:
        folder = find(name)
        opened[name] = found = opened.get(name) or open_checkpoint(name)
        for part in parts:
            if getattr(found, part) is None:
                raise UserError(f"config.{key}={name}: this checkpoint has no {part}")
        prints[key] = fingerprint(folder)
        return found

    if not config.autoencoder:
        raise UserError("config.autoencoder is missing: name a checkpoint, such as shapes")
    base = open_named("autoencoder", config.autoencoder, "vae")
    # Of a whole model, such as the bundled one, each part's own history counts.
    made = {"autoencoder": base.provenance.get("autoencoder", base.provenance)}
    if config.start:  # a name: step 0 alone needs the folder
        made["start"] = Path(config.start).name
    base = Checkpoint(vae=base.vae, params={"vae": base.params["vae"]}, provenance=made)
    if encoder.checkpoint:
        parts = "text_encoder", "tokenizer"
        found = open_named("text_encoder.checkpoint", encoder.checkpoint, *parts)
        base.text_encoder, base.tokenizer = found.text_encoder, found.tokenizer
        made["text_encoder"] = {k: v for k, v in found.provenance.items() if k != "autoencoder"}
        base.instruction = found.instruction if encoder.instruction else None
        # Beside a diffusers folder it depends on the machine.
        prints["text_encoder.instruction"] = base.instruction.sha256 if base.instruction else ""
        if encoder.train and base.instruction:
            raise UserError(
                "config.text_encoder.instruction: a text encoder that trains reads none; give"
                " config.text_encoder.instruction=False"
            )
        if encoder.tokenizer:
            raise UserError(
                "config.text_encoder.tokenizer is for a new text encoder; .checkpoint has its own,"
                " give one of the two"
            )
        if not encoder.train:
            base.params["text_encoder"] = found.params["text_encoder"]
        else:
            then, now = vars(base.text_encoder), vars(_network(Gemma2Config, config, READER))
            if differing := [key for key in now if now[key] != then[key]]:
                raise UserError(
                    ", ".join(f"config.{READER}.{key}={now[key]}" for key in differing)
                    + f": of config.text_encoder.checkpoint={encoder.checkpoint}, which is trained"
                    f" on, it is {', '.join(str(then[key]) for key in differing)}"
                )
    else:
        if not encoder.train or not encoder.tokenizer:
            raise UserError(
                "config.text_encoder.checkpoint is missing: name one, or train a new text encoder"
                " with config.text_encoder.train=True and .tokenizer=FOLDER"
            )
        base.text_encoder = _network(Gemma2Config, config, READER)
        folder = Path(encoder.tokenizer).expanduser()
        base.tokenizer = text.load_tokenizer(folder)
        names = "tokenizer.json", "tokenizer.model"  # one is there
        file = next(path for path in map(folder.joinpath, names) if path.is_file())
        prints["text_encoder.tokenizer"] = native.sha256_of(file)
    if len(base.tokenizer) > base.text_encoder.vocab_size:
        raise UserError(
            f"config.text_encoder.network.vocab_size={base.text_encoder.vocab_size}: the tokenizer"
            f" has {len(base.tokenizer)} tokens"
        )
    base.dit = _network(SanaConfig, config, "network")
    base.text_rows = arguments.whole("config.text_encoder.rows", encoder.rows, 2, 2**16)
    base.flow_shift = float(config.recipe.noise.shift)
    check_fit(base)
    return base, prints


def open_start(config: ConfigDict) -> Any:
    """The transformer's weights that config.start names, which step 0 alone needs."""
    found, network = open_checkpoint(config.start), _network(SanaConfig, config, "network")
    if found.dit is None:
        raise UserError(f"config.start={config.start}: this checkpoint has no transformer")
    theirs, ours = (nn.unbox(abstract_params(c)) for c in (found.dit, network))
    if theirs != ours:
        raise UserError(f"config.start={config.start} does not have the weights of config.network")
    for key in ("head_dim", "cross_heads", "timestep_scale", "clip_attention"):  # of no shape
        then, now = getattr(found.dit, key), getattr(network, key)
        if then != now:
            logging.warning("config.network.%s=%s, but %s of %s", key, now, then, config.start)
    return found.params["dit"]


def open_encoder(config: ConfigDict) -> Any:
    """The weights that a text encoder starts from, which trains."""
    return open_checkpoint(config.text_encoder.checkpoint).params["text_encoder"]


def read_recipe(config: ConfigDict) -> Recipe:
    """config.recipe, its learning rate as config.auto_lr says. Raises UserError."""
    fields = config.recipe.to_dict()
    try:
        optimizer = OptimizerConfig(**fields.pop("optimizer"))
        recipe = Recipe(optimizer=optimizer, noise=NoiseConfig(**fields.pop("noise")), **fields)
    except (TypeError, UserError) as error:
        raise UserError(f"config.recipe: {error}") from None
    if config.auto_lr not in ("none", "sqrt"):
        raise UserError(f"config.auto_lr={config.auto_lr!r}: give none or sqrt")
    counts = ("steps", "batch_size", "microbatches", "encoder_microbatches")
    limits = {key: (1, 2**31) for key in counts} | {"caption_dropout": (0, 1), "ema_decay": (0, 1)}
    for key, (low, high) in limits.items():
        if not low <= (value := getattr(recipe, key)) <= high:
            raise UserError(f"config.recipe.{key}={value}: give {low} to {high}")
    try:
        make_schedule(optimizer, recipe.steps)
    except UserError as error:
        raise UserError(f"config.recipe.optimizer.{error}") from None
    if config.auto_lr == "sqrt":
        rate = sqrt_scaled(optimizer.learning_rate, recipe.batch_size, AUTO_LR_BATCH)
        optimizer = dataclasses.replace(optimizer, learning_rate=rate)
    return dataclasses.replace(recipe, optimizer=optimizer)


def check_batches(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError where a batch does not split over the devices and into its parts."""
    recipe = config.recipe
    divisor = sharding.batch_divisor(mesh) * recipe.microbatches * recipe.encoder_microbatches
    for key in ("recipe", "evaluation")[: 2 if config.loop.evaluate_every else 1]:
        size = config[key].batch_size
        if size < 1 or size % divisor:
            raise UserError(
                f"config.{key}.batch_size={size}: it is a multiple of {divisor}, the devices that"
                " split it times the microbatches and the encoder's"
            )


def make_task(config: ConfigDict, base: Checkpoint, captions: CaptionWindow) -> TextToImageTask:
    """The task of a config. Raises UserError naming the key."""
    if config.remat not in REMAT:
        raise UserError(f"config.remat={config.remat!r}: give {', '.join(REMAT)}")
    if config.unroll < 1:
        raise UserError(f"config.unroll={config.unroll}: give 1 or more")
    if config.dtype not in ("float32", "bfloat16"):
        raise UserError(f"config.dtype={config.dtype!r}: give float32 or bfloat16")
    dtype, train, recipe = config.dtype, config.text_encoder.train, read_recipe(config)
    dit = module_for(base.dit, dtype, "float32")
    dit = dataclasses.replace(dit, remat=config.remat, unroll=config.unroll)
    encoder = module_for(base.text_encoder, dtype, "float32" if train else dtype)
    encoder = dataclasses.replace(encoder, trains=train, unroll=config.unroll)
    vae = module_for(base.vae, frozen_dtype("vae", dtype))
    try:
        return TextToImageTask(recipe, dit, vae, encoder, captions, train)
    except UserError as error:
        raise UserError(f"config.recipe: {error}") from None


def frozen_dtype(name: str, dtype: str) -> str:
    """Of a network that does not train, beside a transformer that computes in `dtype`.

    Images are encoded in float32, as by SANA and `precompute`: bfloat16 shifts the latents.
    """
    return "float32" if name == "vae" else dtype


def flops_of_row(task: TextToImageTask, size: int, images: bool, captions: bool) -> int:
    """FLOPs that a step needs for one image of `size` pixels a side.

    `images`, `captions`: whether these are encoded in the step, or stored.
    """
    side, rows = size // task.vae.config.factor, len(task.captions.window)
    count = 3 * flops.trunk(task.dit.config, side, side, rows)  # forward, and twice back
    if images:
        count += flops.encode(task.vae.config, size, size)
    if captions:
        told = len(task.captions.prefix)  # after an instruction the first row is that of it
        read = flops.text(task.text_encoder.config, rows - bool(told), told)
        count += (3 if "text_encoder" in task.trained else 1) * read
    return count


def abstract_training(
    config: ConfigDict, mesh: Mesh
) -> tuple[Any, Any, Any, tuple[Any, ...], int, int]:
    """What is compiled, before any checkpoint is there: (step, state, batch, inputs, size, flops).

    `step` is under jit: step.lower(state, batch, *inputs) with `mesh` set. The next three are
    ShapeDtypeStructs with shardings; then pixels a side, and the FLOPs of an image. Named
    checkpoints are not looked at: the autoencoder is SANA's, the text encoder
    config.text_encoder.network after an instruction as long as SANA's.
    """
    encoder, rows = config.text_encoder, config.text_encoder.rows
    base = Checkpoint(
        vae=DCAEConfig(),
        dit=_network(SanaConfig, config, "network"),
        text_encoder=_network(Gemma2Config, config, READER),
    )
    told = encoder.instruction and not encoder.train
    tokens = rows - 1 if told else rows
    none = np.zeros((1, rows), np.int32)
    empty = text.TokenizedPrompts((), none, np.arange(rows), none.astype(bool))
    prefix = (0,) * INSTRUCTION_TOKENS if told else ()
    window = np.maximum(np.arange(rows) - (rows - tokens), 0)
    captions = SimpleNamespace(prefix=prefix, window=window, empty=empty)
    task = make_task(config, base, captions)
    state, _ = on_mesh(lambda: task.init(jax.random.key(0)), mesh)

    def placed(shape, dtype):
        where = sharding.batch_sharding(mesh)
        return jax.ShapeDtypeStruct((task.recipe.batch_size, *shape), dtype, sharding=where)

    side = size = config.data.size or base.dit.sample_size * base.vae.factor
    batch = {"tokens": placed((tokens,), jnp.int32), "mask": placed((rows,), jnp.bool_)}
    if config.data.source.startswith("precomputed:"):
        side //= base.vae.factor
        batch["latents"] = placed((side, side, base.vae.latent_channels), jnp.float32)
    else:
        batch["image"] = placed((side, side, 3), jnp.float32)
    vae = abstract_placed(base.vae, frozen_dtype("vae", config.dtype), mesh)
    if encoder.train:
        frozen = Frozen(vae)
    else:
        dtype = frozen_dtype("text_encoder", config.dtype)
        params = abstract_placed(base.text_encoder, dtype, mesh)
        everywhere = NamedSharding(mesh, P())
        constants = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
            jax.eval_shape(task.read_constants, params),
        )
        frozen = Frozen(vae, params, *constants)
    count = flops_of_row(task, size, "image" in batch, captions=True)
    return compile_step(task.step, state), state, batch, (frozen,), size, count


def open_workdir(
    workdir: str | epath.Path, ema: bool = True, rest: str | None = None
) -> Checkpoint:
    """The model of a training's newest checkpoint that is whole: its average, or what trains.

    What did not train is read from the checkpoint `rest`, or else from where the config says, and
    must be as it was. Raises UserError.
    """
    document, trained = read_newest(workdir, "ema" if ema else "params")
    settings = document["config"]
    if "fingerprints" not in settings:
        raise UserError(f"{workdir} is no text-to-image training")
    prints = settings.pop("fingerprints")
    if rest:
        settings["autoencoder"] = rest
        if settings["text_encoder"]["checkpoint"]:
            settings["text_encoder"]["checkpoint"] = rest
    try:
        base, now = open_base(ConfigDict(settings))
    except UserError as error:
        if rest:
            raise
        raise UserError(f"{error}; --rest says where it is now") from error
    for name in prints:
        if now.get(name) != prints[name]:
            raise UserError(f"config.{name} of {workdir} is not what it was in the training")
    return complete(base, jax.tree_util.tree_map_with_path(_lazy, trained), document["step"], ema)


def complete(base: Checkpoint, trained: Any, step: int, ema: bool) -> Checkpoint:
    """`base` with what was trained."""
    provenance = {"trained": True, "steps": int(step), "ema": ema, **base.provenance}
    return dataclasses.replace(base, params={**base.params, **trained}, provenance=provenance)


def _network(kind: type, config: ConfigDict, key: str) -> Config:
    fields = config
    for name in key.split("."):
        fields = fields[name]
    try:
        return kind(**native.frozen(fields.to_dict()))
    except (TypeError, ValueError) as error:
        raise UserError(f"config.{key}: {error}") from None


def _lazy(path: tuple, array: np.ndarray) -> LazyArray:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return LazyArray(array.shape, array.dtype, partial(cast, name, array))
