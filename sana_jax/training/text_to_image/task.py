"""The train step of text to image: flow matching on latents, given text (SANA, arXiv 2410.10629).

A batch is a dict of rows:

    "image" uint8 (B, H, W, 3), or "latents" float32 (B, h, w, c) as the sampler sees them
    "tokens" int32 (B, T) and "mask" bool (B, L), or "embeddings" (B, L, C) and "mask"
    "weight" float32 (B,) of the rows' errors in the loss; without it they are all 1

The transformer trains, or a LoRA (lora/adapter.py) of it, of the text encoder or of both; the
autoencoder never does, and the text encoder may as a whole. Networks that do not train are inputs
of the step (`Frozen`), so that they are no constants of the compiled program.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from sana_jax.checkpoints.components import abstract_params, init_params
from sana_jax.diffusion import flow_matching
from sana_jax.diffusion.flow import NUM_TIMESTEPS
from sana_jax.diffusion.flow_matching import NoiseConfig
from sana_jax.lora.adapter import TEXT_ENCODER, attach, by_network, new_adapter, with_text_encoder
from sana_jax.lora.config import LoraConfig
from sana_jax.models.dit import SanaConfig
from sana_jax.models.gemma2 import Prefix
from sana_jax.pictures import to_float
from sana_jax.pipeline import programs
from sana_jax.quantisation.table import choose, simulated
from sana_jax.runtime.checks import within
from sana_jax.runtime.errors import UserError
from sana_jax.sharding import constrain
from sana_jax.text.prompts import TokenizedPrompts
from sana_jax.training.microbatches import (
    accumulated_gradients,
    map_microbatches,
    mean_over_microbatches,
)
from sana_jax.training.optimizers.optimizers import OptimizerConfig, make_optimizer
from sana_jax.training.state import TrainState, advance, all_finite, new_state, update_ema

Batch = dict[str, Array]
NO_LORA = LoraConfig()
Step = Callable[..., tuple[TrainState, dict[str, Array]]]  # of a state, a batch and Frozen
# Of the forward pass, and of the backward pass those that give the gradients of the rows that
# weights are multiplied with, and of the weights.
PRODUCTS = "forward", "rows", "weights"
Null = tuple[Float[Array, "L C"], Bool[Array, " L"]]  # the empty prompt's rows and their mask


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The figures that decide a training, besides the networks and the data."""

    steps: int
    batch_size: int  # of all devices
    optimizer: OptimizerConfig = OptimizerConfig()
    noise: NoiseConfig = NoiseConfig()  # of a flow; the objective of DDPM has its own
    microbatches: int = 1  # a step computes its batch in this many parts
    encoder_microbatches: int = 1  # and encodes the images and texts of each part in this many
    caption_dropout: float = 0.1  # probability of the empty prompt, for classifier-free guidance
    # A dropped caption's own mask, as in NVlabs' code: the model that is written then says
    # unconditional_mask "prompt", and is drawn from so.
    keep_mask: bool = False
    ema_decay: float = 0.9999
    # Quantisation-aware training: the products that are in int8, of PRODUCTS, in the transformer's
    # layers that convert --quantise=w8a8 takes; weights stay float32, and are rounded in each step.
    int8: tuple[str, ...] = ()
    # The velocity to learn is that of config.start's network, not the data's: a training then mends
    # what int8 takes from it. Held-out errors are still the data's.
    follow_start: bool = False

    def __post_init__(self):
        for name in "steps", "batch_size", "microbatches", "encoder_microbatches":
            within(name, getattr(self, name), 1, 2**31)
        for name in "caption_dropout", "ema_decay":
            within(name, getattr(self, name), 0, 1)
        if unknown := sorted(set(self.int8) - {*PRODUCTS}):
            raise UserError(f"int8: {unknown[0]!r} is not one of {', '.join(PRODUCTS)}")
        if self.follow_start and "forward" not in self.int8:
            raise UserError(
                "follow_start: without 'forward' in int8 the start's velocity is there already"
            )


class CaptionWindow(Protocol):
    """The tokens and rows that all texts of a run share."""

    prefix: tuple[int, ...]  # the instruction's tokens, before those of every caption
    window: np.ndarray  # the positions among "tokens" of the rows that the transformer sees
    empty: TokenizedPrompts  # the empty prompt, without the instruction


class Frozen(NamedTuple):
    """Inputs that no step changes.

    A network that trains is None, unless only a LoRA of it does; `prefix` and `null` are None where
    either of the text encoder does.
    """

    vae: Any  # parameters
    text_encoder: Any = None  # parameters
    prefix: Prefix | None = None  # the instruction's keys and values
    null: Null | None = None
    dit: Any = None  # parameters


class TextToImageTask:
    """The networks of a training, the start of their state, and the step that changes it."""

    def __init__(
        self,
        recipe: Recipe,
        dit: nn.Module,
        vae: nn.Module,
        text_encoder: nn.Module,
        captions: CaptionWindow,
        train_text_encoder: bool = False,
        lora: LoraConfig = NO_LORA,
    ):
        """
        Args:
          recipe: the figures of the training.
          dit, vae, text_encoder: the networks; those that train have float32 parameters.
          captions: the window of the batches' tokens, as of data/text_image.py's CaptionTokens.
          train_text_encoder: train the text encoder beside the transformer.
          lora: with a rank, all that trains; state.params has it as "lora".

        Raises:
          UserError: the optimizer's figures are bad, or a text encoder that trains reads an
            instruction, whose keys and values would change with every step.
        """
        if train_text_encoder and captions.prefix:
            raise UserError("a text encoder that trains reads no instruction; leave it out")
        self.recipe, self.captions, self.lora = recipe, captions, lora
        self.dit, self.vae, self.text_encoder = dit, vae, text_encoder
        self.int8_layers: tuple[str, ...] = ()
        if recipe.int8:
            if lora.rank:
                raise UserError("int8: a LoRA trains beside weights that convert --quantise rounds")
            chosen = choose({"dit": abstract_params(dit.config)}, "w8a8").quantised["dit"]
            self.int8_layers = tuple(name for name, _ in chosen)
        self.noise = flow_matching.DDPM if dit.config.objective == "ddpm" else recipe.noise
        # The start of each part that trains, by its name in state.params.
        self.trained = {"dit": partial(init_params, dit)}
        if lora.rank:
            boxes = (abstract_params(network.config) for network in (dit, text_encoder))
            self.trained = {"lora": partial(new_adapter, with_text_encoder(*boxes), lora)}
        if train_text_encoder:
            self.trained["text_encoder"] = partial(init_params, text_encoder)
        shapes = jax.eval_shape(self._init_params, jax.random.key(0))
        self.reader_trains = train_text_encoder or TEXT_ENCODER in shapes.get("lora", {})
        if self.reader_trains and recipe.follow_start:
            raise UserError(
                "follow_start: the start has read other text than an encoder that trains"
            )
        if self.reader_trains:
            self.text_encoder = text_encoder.clone(trains=True)
        self.tx, self.schedule = make_optimizer(recipe.optimizer, shapes, recipe.steps)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps that take turns."""
        return (self.step,)

    @property
    def below(self) -> SanaConfig | None:
        """The network of `Frozen.dit`."""
        return self.dit.config if self.lora.rank or self.recipe.follow_start else None

    @property
    def passes(self) -> float:
        """The FLOPs of a step, in forward passes of the transformer; see models/flops.py.

        Backward costs twice the forward, or as much where no weight of the trunk needs a gradient.
        """
        return (2 if self.lora.rank else 3) + self.recipe.follow_start

    def init(self, key: Array) -> TrainState:
        """Returns the state of step 0, its parameters boxed with their logical axes."""
        params_key, key = jax.random.split(key)
        params = self._init_params(params_key)
        return new_state(params, self.tx.init(params), key)

    def read_constants(self, params: Any) -> tuple[Prefix | None, Null]:
        """Returns the instruction's keys and values, and the empty prompt's rows and mask."""
        prefix, empty = None, self.captions.empty
        if self.captions.prefix:
            tokens = jnp.array([self.captions.prefix], jnp.int32)
            prefix = programs.read_prefix(self.text_encoder, params, tokens)
        return prefix, (self._encode_empty(params), jnp.asarray(empty.mask[0]))

    def step(
        self, state: TrainState, batch: Batch, frozen: Frozen
    ) -> tuple[TrainState, dict[str, Array]]:
        """Returns the state after one update, and the update's metrics."""
        recipe = self.recipe
        rows = batch | self._draw(state.step_key(), batch)

        def loss(params: Any, rows: Batch):
            errors = self._errors(params, rows, frozen, trains=True)
            if "weight" in rows:
                errors = errors * rows["weight"]
            return flow_matching.flow_loss(errors, rows["sigma"], self.noise), ()

        (value, _), gradient = accumulated_gradients(loss, state.params, rows, recipe.microbatches)
        norm = optax.tree.norm(gradient)
        updates, opt_state = self.tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        done = state.step - state.skipped
        state = advance(
            state,
            all_finite((value, norm)),
            params=params,
            opt_state=opt_state,
            ema=update_ema(state.ema, params, recipe.ema_decay, done),
        )
        rate = self.schedule(done)
        return state, {"loss": value, "gradient_norm": norm, "learning_rate": rate}

    def error_at(
        self, params: Any, batch: Batch, frozen: Frozen, sigma: Float[Array, ""], key: Array
    ) -> Float[Array, ""]:
        """Returns the mean squared error of the velocity at one noise level, with all captions."""
        rows = batch | self._draw(key, batch)
        levels = jnp.full_like(rows["sigma"], sigma)
        fixed = {
            "sigma": levels,
            "timestep": NUM_TIMESTEPS * levels,
            "dropped": jnp.zeros_like(rows["dropped"]),
        }

        def error(rows):
            return self._errors(params, rows, frozen).mean()

        return mean_over_microbatches(error, rows | fixed, self.recipe.microbatches)

    def _draw(self, key: Array, batch: Batch) -> Batch:
        """Draws all that is random in a step, for the whole batch, whatever the microbatches."""
        of_levels, of_noise, of_dropout = jax.random.split(key, 3)
        latents, recipe = jax.eval_shape(self._latent_shape, batch), self.recipe
        count = latents.shape[0]
        sigma, timestep = flow_matching.draw_levels(of_levels, count, self.noise)
        noise = flow_matching.draw_noise(of_noise, latents)
        drawn = {
            "sigma": sigma,
            "timestep": timestep,
            "noise": constrain(noise, "batch", None, None, None),
            "dropped": flow_matching.draw_dropped(of_dropout, count, recipe.caption_dropout),
        }
        if self.lora.dropout:  # a key for each row: a microbatch uses the first that it has
            drawn["lora_key"] = jax.random.bits(jax.random.fold_in(key, 3), (count, 2), jnp.uint32)
        return drawn

    def network(self, name: str, params: Any, frozen: Frozen, dropout: float = 0.0) -> Any:
        """Returns the parameters of "dit" or "text_encoder", as the recipe has them multiplied.

        The LoRA is beside them if one trains.
        """
        if name == "dit" and name in params:
            return simulated(params[name], self.int8_layers, self.recipe.int8)
        if name in params:
            return params[name]
        below, adapter = getattr(frozen, name), by_network(params.get("lora", {})).get(name)
        return attach(below, [(adapter, self.lora.scale)], dropout) if adapter else below

    def _errors(
        self, params: Any, rows: Batch, frozen: Frozen, trains: bool = False
    ) -> Float[Array, " B"]:
        """Returns the mean squared error of each row's velocity; with dropout where it `trains`."""
        latents = self._latents(rows, frozen)
        embeddings, mask = self._text(params, rows, frozen)
        noisy = flow_matching.interpolate(latents, rows["noise"], rows["sigma"])
        timestep = rows["timestep"] * self.dit.config.timestep_scale
        keys, dropout = {}, self.lora.dropout if trains else 0.0
        if dropout:
            keys["dropout"] = jax.random.wrap_key_data(rows["lora_key"][0], impl="threefry2x32")
        given = noisy, timestep, embeddings, mask
        variables = {"params": self.network("dit", params, frozen, dropout)}
        velocity = self.dit.apply(variables, *given, rngs=keys)
        if trains and self.recipe.follow_start:
            target = self.dit.apply({"params": frozen.dit}, *given)
        else:
            target = flow_matching.velocity_of(latents, rows["noise"])
        return flow_matching.row_errors(velocity, target)

    def _latents(self, rows: Batch, frozen: Frozen) -> Float[Array, "B h w c"]:
        if "latents" in rows:
            return rows["latents"]

        def encode(images):
            return self.vae.apply({"params": frozen.vae}, to_float(images), method="encode")

        latents = map_microbatches(encode, rows["image"], self.recipe.encoder_microbatches)
        return latents.astype(jnp.float32) * self.vae.config.scaling_factor

    def _text(
        self, params: Any, rows: Batch, frozen: Frozen
    ) -> tuple[Float[Array, "B L C"], Bool[Array, "B L"]]:
        """Returns the captions' embeddings and mask for the transformer, after dropout."""
        recipe, mask = self.recipe, rows["mask"]
        if "embeddings" in rows:
            (null, null_mask), embeddings = frozen.null, rows["embeddings"].astype(jnp.float32)
        elif self.reader_trains:
            encoder = self.network(TEXT_ENCODER, params, frozen)
            prefix, (null, null_mask) = self.read_constants(encoder)
            embeddings = self._encode(encoder, (rows["tokens"], mask), prefix)
        else:
            null, null_mask = frozen.null
            encode = partial(self._encode, frozen.text_encoder, prefix=frozen.prefix)
            embeddings = map_microbatches(
                encode, (rows["tokens"], mask), recipe.encoder_microbatches
            )
        return flow_matching.drop_captions(
            rows["dropped"], embeddings, mask, null, null_mask, recipe.keep_mask
        )

    def _encode(
        self, params: Any, texts: tuple[Array, Array], prefix: Prefix | None = None
    ) -> Float[Array, "B L C"]:
        tokens, mask = texts
        window = self.captions.window
        return programs.encode_text(self.text_encoder, params, tokens, prefix, window, mask)

    def _encode_empty(self, params: Any) -> Float[Array, "L C"]:
        empty = self.captions.empty
        if self.recipe.keep_mask:
            return programs.encode_padded(self.text_encoder, params, empty.tokens, empty.mask)[0]
        rows = empty.tokens, None, empty.window, empty.mask
        return programs.encode_text(self.text_encoder, params, *rows)[0]

    def _latent_shape(self, batch: Batch) -> Float[Array, "B h w c"]:
        if "latents" in batch:
            return batch["latents"]
        factor, channels = self.vae.config.factor, self.vae.config.latent_channels
        rows, height, width, _ = batch["image"].shape
        return jnp.zeros((rows, height // factor, width // factor, channels))

    def _init_params(self, key: Array) -> Any:
        keys = jax.random.split(key, len(self.trained))
        parts = zip(self.trained.items(), keys, strict=True)
        return {name: start(key) for (name, start), key in parts}
