"""The train steps of Sana-Sprint's distillation (arXiv 2503.09641, section 3): sCM and LADD.

The student is the teacher with an embedding of the guidance scale, and starts from its weights.
Batches are those of text to image (text_to_image/task.py). Two steps take turns, each with an
optimizer of its own, the student's first:

    student         consistency * sCM loss (consistency.py) + adversarial * -mean(logits)
    discriminator   hinge loss of heads on the frozen teacher's tokens (discriminator.py)

Where `adversarial` is 0 there is no discriminator, and every step is the student's. The teacher is
a flow's network, and read through TrigFlow (diffusion/trigflow.py), which loses nothing.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange, repeat
from flax import linen as nn
from jaxtyping import Array, Float

from sana_jax.checkpoints.components import init_params
from sana_jax.diffusion import flow_matching, trigflow
from sana_jax.diffusion.flow import NUM_TIMESTEPS
from sana_jax.models.dit import SanaConfig
from sana_jax.models.embedders import TimestepEmbedder
from sana_jax.models.features import FeatureTransformer
from sana_jax.models.layers import dense
from sana_jax.runtime import checks
from sana_jax.runtime.errors import UserError
from sana_jax.sharding import constrain
from sana_jax.training.distillation.consistency import (
    consistency_loss,
    data_of,
    draw_angles,
    state_at,
    tangent,
)
from sana_jax.training.distillation.discriminator import STATE, Discriminator, groups_of
from sana_jax.training.distillation.losses import discriminator_loss, generator_loss, misaligned
from sana_jax.training.microbatches import accumulated_gradients
from sana_jax.training.optimizers.optimizers import OptimizerConfig, make_optimizer
from sana_jax.training.state import TrainState, advance, all_finite, new_state, update_ema
from sana_jax.training.text_to_image.task import (
    Batch,
    CaptionWindow,
    Frozen,
    Recipe,
    Step,
    TextToImageTask,
)

COUNTS = "student", "all"


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """The figures of a distillation; defaults are the paper's, where NVlabs' code has others."""

    guidance: tuple[float, ...] = (4.0, 4.5, 5.0)  # scales that are drawn from, and embedded
    angle_mean: float = 0.0  # of the student's angles, see consistency.draw_angles; NVlabs: 0.2
    angle_std: float = 1.6
    warmup_steps: int = 4000  # over which the tangent's r rises to 1
    warmup_counts: str = "student"  # steps of the student; NVlabs: "all", the discriminator's too
    tangent_constant: float = 0.1
    consistency: float = 1.0
    adversarial: float = 0.5
    # For LADD a sample's angle is the largest with this probability.
    largest_probability: float = 0.5
    # The largest where the discriminator trains; diffusers' script has the probability, 0.5, here.
    discriminator_largest: float = math.pi / 2
    # Of the angles at which the discriminator looks.
    discriminator_mean: float = -0.6
    discriminator_std: float = 1.0
    separate_angles: bool = False  # for real and fake samples; NVlabs: True
    misaligned: bool = False  # count samples with others' captions as fakes too; NVlabs: True
    blocks: tuple[int, ...] = (2, 8, 14, 19)  # of the teacher, whose tokens have heads
    discriminator: OptimizerConfig = OptimizerConfig()
    # Regular expressions of whole paths of parameters: those of the student that train.
    trainable: tuple[str, ...] = (".*",)

    def __post_init__(self):
        if not self.guidance:
            raise UserError("guidance is empty: give some scales")
        for scale in self.guidance:
            checks.number("guidance", scale, -1e6, 1e6)
        if self.warmup_counts not in COUNTS:
            raise UserError(f"warmup_counts={self.warmup_counts!r}: give {' or '.join(COUNTS)}")
        for name in "angle_std", "discriminator_std", "tangent_constant":
            checks.positive(name, getattr(self, name))
        for name in "warmup_steps", "consistency", "adversarial":
            checks.at_least(name, getattr(self, name), 0)
        checks.within("largest_probability", self.largest_probability, 0, 1)
        checks.within("discriminator_largest", self.discriminator_largest, 0, math.pi / 2)
        if not self.blocks or sorted({-1, *self.blocks}) != [-1, *self.blocks]:
            raise UserError(f"blocks={self.blocks}: give rising numbers from 0")
        if not self.consistency and not self.adversarial:
            raise UserError("consistency=0.0: with adversarial=0.0 too there is no loss")


class DistillationTask(TextToImageTask):
    """The networks of a distillation, the start of their state, and the steps that change it.

    state.params has "dit", the student, and "log_variance"; with a discriminator "heads" and
    "spectral" too (discriminator.py). The moving average is of the student alone. `frozen.dit`
    is the teacher.
    """

    def __init__(
        self,
        recipe: Recipe,
        dit: nn.Module,
        teacher: nn.Module,
        vae: nn.Module,
        text_encoder: nn.Module,
        captions: CaptionWindow,
        config: DistillationConfig,
    ):
        """`dit` is the student; see TextToImageTask for the others. Raises UserError."""
        super().__init__(recipe, dit, vae, text_encoder, captions)
        self.teacher, self.config = teacher, config
        # The operations' kernels have no forward derivative; their plain forms have.
        self._plain = dit.clone(implementation="xla", remat="none")
        self._log_variance = dense(
            1,
            ("embed", None),
            kernel_init=nn.initializers.zeros,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
        )
        self.trained = {"dit": self._init_student, "log_variance": self._init_log_variance}
        shapes = jax.eval_shape(self._init_params, jax.random.key(0))
        steps = -(-recipe.steps // len(self.steps))
        self.tx, self.schedule = make_optimizer(recipe.optimizer, shapes, steps, config.trainable)
        if config.adversarial:
            groups_of(recipe.batch_size // recipe.microbatches)
            names = {field.name for field in dataclasses.fields(teacher)} - {"parent", "name"}
            self._features = FeatureTransformer(**{name: getattr(teacher, name) for name in names})
            self._discriminator = Discriminator(dtype=teacher.dtype)
            shapes = jax.eval_shape(self._init_discriminator, jax.random.key(0))["params"]
            given = config.discriminator, shapes, recipe.steps // len(self.steps)
            self.discriminator_tx, self.discriminator_schedule = make_optimizer(*given)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps that take turns."""
        both = self.student_step, self.discriminator_step
        return both if self.config.adversarial else both[:1]

    @property
    def below(self) -> SanaConfig:
        return self.teacher.config

    @property
    def passes(self) -> float:
        """On the average of the steps that take turns; a forward derivative counts as a pass."""
        config = self.config
        # The guided teacher, the student with its derivative, the student with its gradient; then
        # the student and the teacher's tokens, with gradients.
        student = bool(config.consistency) * (2 + 2 + 3) + bool(config.adversarial) * (3 + 2)
        discriminator = 1 + 2 + config.misaligned
        return (student + discriminator) / 2 if config.adversarial else student

    def init(self, key: Array) -> TrainState:
        of_student, of_heads, key = jax.random.split(key, 3)
        params = self._init_params(of_student)
        opt_state, average = {"student": self.tx.init(params)}, {"dit": params["dit"]}
        if self.config.adversarial:
            heads = self._init_discriminator(of_heads)
            opt_state["discriminator"] = self.discriminator_tx.init(heads["params"])
            params |= {"heads": heads["params"], "spectral": heads[STATE]}
        state = new_state(params, opt_state, key, ema=False)
        return state.replace(ema=jax.tree.map(jnp.copy, average))

    def student_step(
        self, state: TrainState, batch: Batch, frozen: Frozen
    ) -> tuple[TrainState, dict[str, Array]]:
        """Returns the state after an update of the student, and the update's metrics."""
        recipe, done = self.recipe, (state.step - state.skipped) // len(self.steps)
        rows = batch | self._draw(state.step_key(), batch)
        trained = {name: state.params[name] for name in self.trained}

        def loss(params: Any, rows: Batch):
            params = state.params | params
            return self._student_loss(params, rows, frozen, self._warmup(state))

        (value, metrics), gradient = accumulated_gradients(loss, trained, rows, recipe.microbatches)
        norm = optax.tree.norm(gradient)
        updates, opt_state = self.tx.update(gradient, state.opt_state["student"], trained)
        params = optax.apply_updates(trained, updates)
        state = advance(
            state,
            all_finite((value, norm)),
            params=state.params | params,
            opt_state=state.opt_state | {"student": opt_state},
            ema=update_ema(state.ema, {"dit": params["dit"]}, recipe.ema_decay, done),
        )
        rate = self.schedule(done)
        metrics |= {"loss": value, "gradient_norm": norm, "learning_rate": rate}
        return state, metrics

    def discriminator_step(
        self, state: TrainState, batch: Batch, frozen: Frozen
    ) -> tuple[TrainState, dict[str, Array]]:
        """Returns the state after an update of the discriminator, and the update's metrics."""
        recipe, params = self.recipe, state.params
        rows = batch | self._draw(state.step_key(), batch)
        # The singular vectors are the kernels' own, so any features serve to improve them.
        given = {"params": params["heads"], STATE: params["spectral"]}, self._no_features()
        _, new = self._discriminator.apply(*given, update=True, mutable=[STATE])

        def loss(heads: Any, rows: Batch):
            now = params | {"heads": heads, "spectral": new[STATE]}
            return self._discriminator_loss(now, rows, frozen)

        (value, metrics), gradient = accumulated_gradients(
            loss, params["heads"], rows, recipe.microbatches
        )
        norm = optax.tree.norm(gradient)
        optimizer = state.opt_state["discriminator"]
        updates, optimizer = self.discriminator_tx.update(gradient, optimizer, params["heads"])
        heads = optax.apply_updates(params["heads"], updates)
        state = advance(
            state,
            all_finite((value, norm)),
            params=params | {"heads": heads, "spectral": new[STATE]},
            opt_state=state.opt_state | {"discriminator": optimizer},
        )
        return state, metrics | {"discriminator": value, "discriminator_gradient_norm": norm}

    def _discriminator_loss(self, params: Any, rows: Batch, frozen: Frozen):
        config = self.config
        data, text = self._latents(rows, frozen), self._text(params, rows, frozen)
        fake = jax.lax.stop_gradient(
            self._few_step_data(params, rows, data, text, config.discriminator_largest)
        )
        logits = partial(self._logits, params, frozen=frozen, text=text)
        looked = rows["look"], rows["look_noise"]
        other = (rows["other"], rows["other_noise"]) if config.separate_angles else looked
        found = [logits(latents=fake, angle=looked[0], noise=looked[1])]
        if config.misaligned:
            found.append(logits(latents=misaligned(data), angle=looked[0], noise=looked[1]))
        fake = jnp.concatenate(found)
        real = logits(latents=data, angle=other[0], noise=other[1])
        metrics = {"real_logit": real.mean(), "fake_logit": fake.mean()}
        return discriminator_loss(real, fake), metrics

    def _few_step_data(self, params: Any, rows: Batch, data, text, largest: float):
        """Returns the data that the student sees in a state of its own, often in pure noise."""
        angle = jnp.where(rows["is_largest"], largest, rows["fresh_angle"])
        x = state_at(angle, data, rows["fresh_noise"])
        value = self._velocity(self.dit, params["dit"], x, angle, text, rows["guidance"])
        return data_of(angle, x, value)

    def _logits(self, params: Any, latents, angle, noise, text, frozen: Frozen):
        """Returns the discriminator's logits on latents with noise, read by the teacher."""
        x = flow_matching.interpolate(latents, noise, trigflow.flow_time(angle))
        inputs = x, self._timestep(self.teacher, trigflow.flow_time(angle)), *text
        blocks = self.config.blocks
        features = self._features.apply({"params": frozen.dit}, *inputs, blocks, method="features")
        variables = {"params": params["heads"], STATE: params["spectral"]}
        return self._discriminator.apply(variables, features)

    def _no_features(self) -> tuple[Array, ...]:
        return (jnp.zeros((1, 1, self.dit.config.width)),) * len(self.config.blocks)

    def _init_discriminator(self, key: Array) -> Any:
        return self._discriminator.init(key, self._no_features())

    def _warmup(self, state: TrainState) -> Float[Array, ""]:
        steps = state.step
        if self.config.warmup_counts == "student":
            steps = steps // len(self.steps)
        return jnp.minimum(steps / max(self.config.warmup_steps, 1), 1.0)

    def _student_loss(self, params: Any, rows: Batch, frozen: Frozen, warmup: Array):
        config, metrics, total = self.config, {}, 0.0
        data, text = self._latents(rows, frozen), self._text(params, rows, frozen)
        if config.consistency:
            angle, guidance = rows["angle"], rows["guidance"]
            x = state_at(angle, data, rows["noise"])
            teacher = self._guided(frozen.dit, x, angle, text, guidance, frozen)
            fixed = jax.lax.stop_gradient(params["dit"])

            def student(x, angle):
                return self._velocity(self._plain, fixed, x, angle, text, guidance)

            g = tangent(student, x, angle, teacher, warmup, config.tangent_constant)
            value = self._velocity(self.dit, params["dit"], x, angle, text, guidance)
            loss = consistency_loss(value, g, angle, self._uncertainty(params, angle, guidance))
            metrics["consistency"] = loss
            metrics["teacher_error"] = jnp.mean((value - teacher) ** 2)
            total += config.consistency * loss
        if config.adversarial:
            fake = self._few_step_data(params, rows, data, text, math.pi / 2)
            given = rows["look"], rows["look_noise"], text, frozen
            metrics["generator"] = generator_loss(self._logits(params, fake, *given))
            total += config.adversarial * metrics["generator"]
        return total, metrics

    def _uncertainty(self, params: Any, angle: Array, guidance: Array) -> Float[Array, " B"]:
        """Returns the learned log-variance of each row's error, from the student's embedding.

        It starts where tangents of length one have the same weight at all angles. From 0, small
        angles would lead at first, and its way down would drag the embedding along.
        """
        config = self.dit.config
        time = self._timestep(self.dit, trigflow.flow_time(angle))
        embedder = TimestepEmbedder(config.width)
        inputs = time, guidance * config.guidance_embedding
        embedding, _ = embedder.apply({"params": params["dit"]["time_embed"]}, *inputs)
        values = config.sample_size**2 * config.latent_channels
        start = -jnp.log(trigflow.SIGMA_DATA * jnp.tan(angle) * values)
        learned = self._log_variance.apply({"params": params["log_variance"]}, embedding)[:, 0]
        return start + learned

    @staticmethod
    def _timestep(module: nn.Module, time: Array) -> Array:
        return NUM_TIMESTEPS * time * module.config.timestep_scale

    def _velocity(self, module: nn.Module, params: Any, x, angle, text, guidance=None):
        """Returns F of the student or of the teacher, with one text for each row."""

        def network(latents, time, guidance):
            inputs = latents, self._timestep(module, time), *text, guidance
            return module.apply({"params": params}, *inputs)

        return trigflow.velocity(network, x, angle, guidance)

    def _guided(self, params: Any, x, angle, text, guidance, frozen: Frozen):
        """Returns the teacher's F under classifier-free guidance; see denoise.py for the order."""
        (embeddings, mask), (null, null_mask) = text, frozen.null
        null = jnp.broadcast_to(null.astype(embeddings.dtype), embeddings.shape)
        if not self.recipe.keep_mask:
            null_mask = jnp.broadcast_to(null_mask, mask.shape)
        else:
            null_mask = mask
        pairs = jnp.stack([null, embeddings], 1), jnp.stack([null_mask, mask], 1)
        text = tuple(rearrange(pair, "b s ... -> (b s) ...") for pair in pairs)
        x, angle = (repeat(rows, "b ... -> (b s) ...", s=2) for rows in (x, angle))
        both = self._velocity(self.teacher, params, x, angle, text)
        u, c = rearrange(both, "(b s) ... -> s b ...", s=2)
        return jax.lax.stop_gradient(u + guidance[:, None, None, None] * (c - u))

    def _draw(self, key: Array, batch: Batch) -> Batch:
        """Draws all that is random in a step, for the whole batch, whatever the microbatches."""
        latents, config = jax.eval_shape(self._latent_shape, batch), self.config
        count, keys = latents.shape[0], iter(jax.random.split(key, 11))

        def noise():
            drawn = flow_matching.draw_noise(next(keys), latents)
            return constrain(drawn, "batch", None, None, None)

        scales = jnp.asarray(config.guidance, jnp.float32)

        def scale(key):
            return jax.random.choice(key, scales)

        def angles(mean, std):
            return draw_angles(next(keys), count, mean, std)

        drawn = {
            "angle": angles(config.angle_mean, config.angle_std),
            "noise": noise(),
            "guidance": jax.vmap(scale)(flow_matching.row_keys(next(keys), count)),
            "dropped": flow_matching.draw_dropped(next(keys), count, self.recipe.caption_dropout),
        }
        if config.adversarial:
            probability = config.largest_probability
            drawn |= {
                "is_largest": flow_matching.draw_dropped(next(keys), count, probability),
                "fresh_angle": angles(config.angle_mean, config.angle_std),
                "fresh_noise": noise(),
            }
            for name in "look", "other":  # of the discriminator
                drawn[name] = angles(config.discriminator_mean, config.discriminator_std)
                drawn[f"{name}_noise"] = noise()
        return drawn

    def _init_student(self, key: Array) -> Any:
        """Returns parameters in which the guidance scale has no effect yet."""
        params = init_params(self.dit, key)
        last = params["time_embed"]["guidance_linear_2"]
        last |= {"kernel": jax.tree.map(jnp.zeros_like, last["kernel"])}
        return params

    def _init_log_variance(self, key: Array) -> Any:
        return self._log_variance.init(key, jnp.zeros((1, self.dit.config.width)))["params"]
