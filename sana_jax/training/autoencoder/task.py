"""The train step of the autoencoder, the same for the three phases of its training.

DC-AE (arXiv 2410.10733, section 3.3) trains everything at low resolution on reconstruction losses,
then the middle at high resolution, then the decoder's head at low resolution with an adversarial
loss beside the others. A `Phase` says which parameters train, and on what losses.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, UInt8

from sana_jax.models.dc_ae import DCAE
from sana_jax.pictures import to_float
from sana_jax.runtime.checks import at_least, within
from sana_jax.runtime.errors import UserError
from sana_jax.training.autoencoder import losses
from sana_jax.training.autoencoder.discriminator import Discriminator
from sana_jax.training.autoencoder.perceptual import Distance
from sana_jax.training.microbatches import mean_over_microbatches
from sana_jax.training.optimizers.masks import stop_frozen, trainable_mask
from sana_jax.training.optimizers.optimizers import OptimizerConfig, make_optimizer
from sana_jax.training.state import TrainState, advance, all_finite, new_state, update_ema

LAST_LAYER = ("decoder", "conv_out")  # whose gradients the adaptive weight compares


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of the training; the weights of the losses are for means over all elements."""

    steps: int
    image_size: int  # pixels a side
    batch_size: int  # of all devices
    trainable: tuple[str, ...]  # regular expressions that match whole paths of parameters
    autoencoder: OptimizerConfig
    discriminator: OptimizerConfig = OptimizerConfig()
    l1: float = 1.0
    l2: float = 0.0  # squares give more weight to large errors, as at edges
    perceptual: float = 0.25
    adversarial: float = 0.0  # times the adaptive weight; 0: there is no discriminator
    microbatches: int = 1
    ema_decay: float = 0.999
    crop: str = "random"  # of images in another shape: "random" or "centre"
    flip: bool = True

    def __post_init__(self):
        for name in "steps", "image_size", "microbatches":
            at_least(name, getattr(self, name), 1)
        within("ema_decay", self.ema_decay, 0, 1)


class AutoencoderTask:
    """The networks of a phase, the start of their state, and the step that changes it."""

    def __init__(self, model: DCAE, discriminator: Discriminator, phase: Phase, distance: Distance):
        """`distance` is a perceptual loss of perceptual.py.

        Raises UserError for a phase whose patterns match nothing, or which has an adversarial loss
        but does not train the last layer, where that loss is weighed.
        """
        self.model, self.discriminator, self.phase = model, discriminator, phase
        self.distance = distance
        shapes = jax.eval_shape(self._init_autoencoder, jax.random.key(0))
        self.mask = trainable_mask(shapes, phase.trainable)
        self.tx, self.schedule = make_optimizer(
            phase.autoencoder, shapes, phase.steps, phase.trainable
        )
        if phase.adversarial:
            if not any(jax.tree.leaves(self._last_layer(self.mask))):
                raise UserError(
                    f"adversarial={phase.adversarial}: its weight is measured at"
                    f" {'/'.join(LAST_LAYER)}, which no pattern of trainable matches"
                )
            shapes = jax.eval_shape(self._init_discriminator, jax.random.key(0))
            self.discriminator_tx, _ = make_optimizer(phase.discriminator, shapes, phase.steps)

    def init(self, key: Array) -> TrainState:
        """Returns the state of step 0, its parameters boxed with their logical axes."""
        of_autoencoder, of_discriminator, rest = jax.random.split(key, 3)
        boxed = self._init_autoencoder(of_autoencoder)
        params, opt_state = {"autoencoder": boxed}, {"autoencoder": self.tx.init(boxed)}
        if self.phase.adversarial:
            params["discriminator"] = self._init_discriminator(of_discriminator)
            opt_state["discriminator"] = self.discriminator_tx.init(params["discriminator"])
        state = new_state(params, opt_state, rest, ema=False)
        return state.replace(ema=jax.tree.map(jnp.copy, boxed))

    def step(
        self, state: TrainState, batch: dict[str, Array], perceptual_params: Any
    ) -> tuple[TrainState, dict[str, Array]]:
        """Returns the state after one update, and the update's metrics.

        `batch` is {"image": uint8 (B, H, W, 3)}; `perceptual_params` are the parameters of the
        distance.
        """
        phase, params = self.phase, state.params
        gradients = self._gradients(params, perceptual_params)
        found = mean_over_microbatches(gradients, batch["image"], phase.microbatches)
        metrics, gradient = found["metrics"], found["reconstruction"]
        updates, opt_state = {}, {}
        if phase.adversarial:
            ratio = losses.adaptive_weight(
                self._last_layer(gradient), self._last_layer(found["adversarial"])
            )
            metrics["adaptive_weight"] = ratio
            weight = phase.adversarial * ratio
            gradient = jax.tree.map(lambda g, a: g + weight * a, gradient, found["adversarial"])
            updates["discriminator"], opt_state["discriminator"] = self.discriminator_tx.update(
                found["discriminator"],
                state.opt_state["discriminator"],
                params["discriminator"],
            )
        updates["autoencoder"], opt_state["autoencoder"] = self.tx.update(
            gradient, state.opt_state["autoencoder"], params["autoencoder"]
        )
        new = optax.apply_updates(params, updates)
        norm = optax.tree.norm(gradient)
        done = state.step - state.skipped
        state = advance(
            state,
            all_finite((norm, metrics, found.get("discriminator", ()))),
            params=new,
            opt_state=opt_state,
            ema=update_ema(state.ema, new["autoencoder"], phase.ema_decay, done),
        )
        metrics["psnr"] = -10 * jnp.log10(metrics.pop("mse") / 4)
        return state, metrics | {"gradient_norm": norm, "learning_rate": self.schedule(done)}

    def _gradients(self, params: Any, perceptual_params: Any) -> Callable[[Array], dict]:
        """Returns the function of a microbatch that computes metrics and gradients.

        All of them are means over rows, so that they can be averaged over microbatches.
        """
        phase = self.phase

        def reconstruction_loss(reconstructions, images):
            l1 = losses.l1(reconstructions, images)
            distance = self.distance(perceptual_params, reconstructions, images).mean()
            mse = jnp.mean((reconstructions - images) ** 2)
            loss = phase.l1 * l1 + phase.l2 * mse + phase.perceptual * distance
            return loss, {"loss": loss, "l1": l1, "perceptual": distance, "mse": mse}

        def gradients(images: UInt8[Array, "B H W 3"]) -> dict[str, Any]:
            images = to_float(images)

            def reconstruct(autoencoder):
                autoencoder = stop_frozen(autoencoder, self.mask)
                return self.model.apply({"params": autoencoder}, images)

            reconstructions, pull_back = jax.vjp(reconstruct, params["autoencoder"])
            of_pixels, metrics = jax.grad(reconstruction_loss, has_aux=True)(
                reconstructions, images
            )
            found = {"metrics": metrics, "reconstruction": pull_back(of_pixels)[0]}
            if not phase.adversarial:
                return found

            def generator_loss(reconstructions):
                return losses.generator_loss(self._logits(params["discriminator"], reconstructions))

            def discriminator_loss(discriminator):
                fake = self._logits(discriminator, jax.lax.stop_gradient(reconstructions))
                return losses.discriminator_loss(self._logits(discriminator, images), fake)

            metrics["generator"], of_pixels = jax.value_and_grad(generator_loss)(reconstructions)
            found["adversarial"] = pull_back(of_pixels)[0]
            metrics["discriminator"], found["discriminator"] = jax.value_and_grad(
                discriminator_loss
            )(params["discriminator"])
            return found

        return gradients

    def _logits(self, params: Any, images: Array) -> Array:
        return self.discriminator.apply({"params": params}, images)

    def _init_autoencoder(self, key: Array) -> Any:
        factor = self.model.config.factor
        return self.model.init(key, jnp.zeros((1, factor, factor, 3)))["params"]

    def _init_discriminator(self, key: Array) -> Any:
        side = self.phase.image_size
        return self.discriminator.init(key, jnp.zeros((1, side, side, 3)))["params"]

    @staticmethod
    def _last_layer(tree: Any) -> Any:
        for name in LAST_LAYER:
            tree = tree[name]
        return tree
