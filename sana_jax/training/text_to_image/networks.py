"""Opens the networks that a text-to-image config names, and makes the task that trains them.

Frozen networks come from checkpoints that the config names. Their weights stay in those folders;
the training's own checkpoints hold their hashes.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from flax import linen as nn
from flax import traverse_util
from ml_collections import ConfigDict

from sana_jax.checkpoints import native
from sana_jax.checkpoints.components import (
    Checkpoint,
    Config,
    abstract_params,
    check_fit,
    module_for,
)
from sana_jax.checkpoints.find import checkpoint_hash, find
from sana_jax.checkpoints.load import open_checkpoint
from sana_jax.checkpoints.smoothed import check_sites, is_smoothed
from sana_jax.kernels.dispatch import IMPLEMENTATIONS
from sana_jax.lora.adapter import chosen, with_text_encoder
from sana_jax.lora.config import LoraConfig
from sana_jax.models.dit import SanaConfig
from sana_jax.models.gemma2 import Gemma2Config
from sana_jax.models.remat import REMAT
from sana_jax.runtime import checks
from sana_jax.runtime.checks import read_group
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import sha256_of
from sana_jax.text.tokenizers import load_tokenizer, vocabulary_size
from sana_jax.training.text_to_image.recipe import read_recipe
from sana_jax.training.text_to_image.task import CaptionWindow, TextToImageTask

READER = "text_encoder.network"
# By name. To open or to hash a checkpoint may read all its weights, so that a training, whose keys
# name one several times, does each once.
Opener = Callable[[str], Checkpoint]
NO_SPRINT = (
    "Sana-Sprint was distilled, and this training would undo it: start from the model that it was"
    " distilled from"
)


def open_once() -> Opener:
    """Returns `open_checkpoint` that remembers what it has opened."""
    return functools.cache(open_checkpoint)


def open_base(
    config: ConfigDict, opener: Opener | None = None
) -> tuple[Checkpoint, dict[str, str]]:
    """Returns the checkpoint without the weights that train, and the hashes of its parts.

    Raises UserError, naming the key, where a part is missing or the parts do not fit together.
    """
    encoder, prints = config.text_encoder, {}
    opener = opener or open_once()
    hash_of = functools.cache(lambda name: checkpoint_hash(find(name)))

    def open_named(key: str, name: str, *parts: str) -> Checkpoint:
        found, prints[key] = opener(name), hash_of(name)
        for part in parts:
            if getattr(found, part) is None:
                raise UserError(f"config.{key}={name}: this checkpoint has no {part}")
        return found

    if not config.autoencoder:
        raise UserError("config.autoencoder is missing: name a checkpoint, such as shapes")
    base = open_named("autoencoder", config.autoencoder, "vae")
    # In a whole model, such as the bundled one, each part has a history of its own.
    made = {"autoencoder": base.provenance.get("autoencoder", base.provenance)}
    if config.start:  # by name alone, since only step 0 needs the folder
        made["start"] = Path(config.start).name
    base = Checkpoint(vae=base.vae, params={"vae": base.params["vae"]}, provenance=made)
    if encoder.checkpoint:
        parts = "text_encoder", "tokenizer"
        found = open_named("text_encoder.checkpoint", encoder.checkpoint, *parts)
        base.text_encoder, base.tokenizer = found.text_encoder, found.tokenizer
        made["text_encoder"] = {k: v for k, v in found.provenance.items() if k != "autoencoder"}
        base.instruction = found.instruction if encoder.instruction else None
        # A diffusers folder has no instruction: which one is found depends on the machine.
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
            then, now = vars(base.text_encoder), vars(read_network(Gemma2Config, config, READER))
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
        base.text_encoder = read_network(Gemma2Config, config, READER)
        folder = Path(encoder.tokenizer).expanduser()
        base.tokenizer = load_tokenizer(folder)
        names = "tokenizer.json", "tokenizer.model"  # a tokenizer has one of these
        file = next(path for path in map(folder.joinpath, names) if path.is_file())
        prints["text_encoder.tokenizer"] = sha256_of(file)
    if (tokens := vocabulary_size(base.tokenizer)) > base.text_encoder.vocab_size:
        raise UserError(
            f"config.text_encoder.network.vocab_size={base.text_encoder.vocab_size}: the tokenizer"
            f" has {tokens} tokens"
        )
    base.dit = read_network(SanaConfig, config, "network")
    if _start_stays(config):
        base.params["dit"] = _start_beside(config, base, open_named)
    base.text_rows = checks.integer("config.text_encoder.rows", encoder.rows, 2, 2**16)
    base.flow_shift = float(config.recipe.noise.shift)
    base.unconditional_mask = "prompt" if config.recipe.keep_mask else "negative"
    check_fit(base)
    return base, prints


def _start_stays(config: ConfigDict) -> bool:
    """Returns True if the transformer of config.start stays beside what trains."""
    # Runs of before had no such key.
    return bool(read_lora(config).rank or config.recipe.get("follow_start"))


def _start_beside(config: ConfigDict, base: Checkpoint, opener: Callable[..., Checkpoint]) -> Any:
    """Returns the transformer's weights that stay: those below a LoRA, or that are followed.

    What a LoRA trains must fit other checkpoints' rows too.
    """
    if not config.start:
        raise UserError("config.start is missing: name the checkpoint to follow")
    start = opener("start", config.start)
    if read_lora(config).rank and is_smoothed(start):
        both = with_text_encoder(*map(abstract_params, (base.dit, base.text_encoder)))
        try:
            sites = chosen(both, read_lora(config).targets)
        except UserError as error:
            raise UserError(f"config.lora: {error}") from None
        check_sites("config.lora.targets", sites)
    return _weights_of_start(config, start)


def open_start(config: ConfigDict, opener: Opener | None = None) -> Any:
    """Returns the transformer's weights that config.start names: of step 0, or below a LoRA.

    Norms of queries and keys that the config has and the checkpoint has not start at one, as for
    Sana-1.5 (arXiv 2501.18427). Raises UserError if the checkpoint has no transformer, or one of
    other shapes.
    """
    return _weights_of_start(config, (opener or open_checkpoint)(config.start))


def _weights_of_start(config: ConfigDict, found: Checkpoint) -> Any:
    network = read_network(SanaConfig, config, "network")
    if found.dit is None:
        raise UserError(f"config.start={config.start}: this checkpoint has no transformer")
    if found.dit.is_sprint:
        raise UserError(f"config.start={config.start}: {NO_SPRINT}")
    if found.dit.quantised and not network.quantised:
        raise UserError(f"config.start={config.start} is int8: name what it was made from")
    weights, norms = found.params["dit"], network.qk_norm and not found.dit.qk_norm
    normed = dataclasses.replace(found.dit, qk_norm=True) if norms else found.dit
    theirs, ours = (nn.unbox(abstract_params(c)) for c in (normed, network))
    if theirs != ours:
        raise UserError(f"config.start={config.start} does not have the weights of config.network")
    # No shape shows a difference in these.
    unseen = ["head_dim", "cross_heads", "timestep_scale", "clip_attention", "attention"]
    unseen.append("objective")
    # A LoRA's file, or the velocity to follow, is of the network as it is there.
    if stays := _start_stays(config):
        unseen += ["qk_norm", "interpolation_scale", "sample_size"]
    for key in unseen:
        then, now = getattr(found.dit, key), getattr(network, key)
        told = f"config.network.{key}={now}, but {then} of"
        if then != now and stays:
            raise UserError(f"{told} config.start={config.start}")
        if then != now:
            logging.warning("%s %s", told, config.start)
    warn_of_mask(config, found)
    if found.flow_shift != config.recipe.noise.shift:
        told = "config.recipe.noise.shift=%g, with which the model will draw, but %g of %s"
        logging.warning(told, config.recipe.noise.shift, found.flow_shift, config.start)
    if norms:
        logging.warning("%s has no norms of queries and keys: they start at one", config.start)
        weights = _with_norms(weights, ours)
    return weights


def warn_of_mask(config: ConfigDict, start: Checkpoint) -> None:
    """Logs a warning where the model of config.start was trained with another mask of no prompt."""
    if start.unconditional_mask == "prompt" and not config.recipe.keep_mask:
        logging.warning("config.recipe.keep_mask=False, but True of %s", config.start)


def _with_norms(weights: Any, shapes: Any) -> Any:
    """Returns weights and, at one, the norms of queries and keys that `shapes` has beside them."""
    norms = {
        path: np.ones(leaf.shape, np.float32)
        for path, leaf in traverse_util.flatten_dict(shapes).items()
        if {"q_norm", "k_norm"} & set(path)
    }
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(weights) | norms)


def read_lora(config: ConfigDict) -> LoraConfig:
    """Reads config.lora. Raises UserError if what it needs is not there."""
    # Runs of before had no such group.
    lora = read_group(LoraConfig, native.frozen(dict(config.get("lora", {}))), "config.lora")
    if lora.rank and not config.start:
        raise UserError("config.start is missing: name the checkpoint whose LoRA is trained")
    if lora.rank and config.text_encoder.train:
        raise UserError("config.lora.rank: beside a LoRA, give config.text_encoder.train=False")
    return lora


def open_encoder(config: ConfigDict, opener: Opener) -> Any:
    """Returns the weights that a trained text encoder starts from."""
    return opener(config.text_encoder.checkpoint).params["text_encoder"]


def make_task(config: ConfigDict, base: Checkpoint, captions: CaptionWindow) -> TextToImageTask:
    """Returns the task of a config. Raises UserError, naming the key."""
    if base.dit.is_sprint:
        raise UserError(
            f"config.network.guidance_embedding={base.dit.guidance_embedding:g}: {NO_SPRINT}"
        )
    lora, networks = read_lora(config), make_networks(config, base)
    train, recipe = config.text_encoder.train, read_recipe(config)
    try:
        return TextToImageTask(recipe, *networks, captions, train, lora)
    except UserError as error:
        key = "config.lora" if str(error).startswith(("targets", "rank")) else "config.recipe"
        raise UserError(f"{key}: {error}") from None


def make_networks(config: ConfigDict, base: Checkpoint) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Returns transformer, autoencoder and text encoder. Raises UserError, naming the key."""
    if config.remat not in REMAT:
        raise UserError(f"config.remat={config.remat!r}: give {', '.join(REMAT)}")
    implementation = config.network.get("implementation", "auto")
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise UserError(f"config.network.implementation={implementation!r}: give {known}")
    if config.unroll < 1:
        raise UserError(f"config.unroll={config.unroll}: give 1 or more")
    if config.dtype not in ("float32", "bfloat16"):
        raise UserError(f"config.dtype={config.dtype!r}: give float32 or bfloat16")
    dtype, train = config.dtype, config.text_encoder.train
    if base.dit.quantised and not read_lora(config).rank:
        raise UserError(
            "config.network.quantised: int8 weights do not train: give config.lora.rank, for a LoRA"
            " of them, or start from the checkpoint that they were made from"
        )
    dit = module_for(base.dit, dtype, "float32")
    dit = dit.clone(remat=config.remat, unroll=config.unroll, implementation=implementation)
    encoder = module_for(base.text_encoder, dtype, "float32" if train else dtype)
    encoder = encoder.clone(unroll=config.unroll)
    return dit, module_for(base.vae, frozen_dtype("vae", dtype)), encoder


def frozen_dtype(name: str, dtype: str, follow_start: bool = False) -> str:
    """Returns the dtype of a frozen network beside a transformer that computes in `dtype`.

    Images are encoded in float32, as by SANA and `precompute`, since bfloat16 shifts the latents.
    A start that is followed has float32 tables and norms, as what follows it has.
    """
    return "float32" if name == "vae" or (name == "dit" and follow_start) else dtype


def read_network(kind: type, config: ConfigDict, key: str) -> Config:
    """Reads the config of a network, at `key` of the training's config. Raises UserError."""
    fields = config
    for name in key.split("."):
        fields = fields[name]
    fields = native.frozen(fields.to_dict())
    if kind is SanaConfig:
        fields.pop("implementation", None)  # make_task gives it to the module
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.{key}: {error}") from None
