"""A text-to-image training, from a config to a model.

    WORKDIR/checkpoints, metrics.jsonl, tensorboard/, images/    while it trains
    WORKDIR/model/                                               its moving average: a native folder

Everything that a config names is opened, and everything that can be wrong with it is looked at,
before anything is written.
"""

import json
import shutil
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from sana_jax import flops, sharding
from sana_jax.checkpoints import native
from sana_jax.checkpoints.components import component_dtype, place
from sana_jax.checkpoints.training import Checkpoints
from sana_jax.data import buckets
from sana_jax.data.captions import CaptionChoice
from sana_jax.data.loader import TrainingLoader
from sana_jax.data.orders import bucket_order
from sana_jax.data.precomputed import Precomputed, weights_sha256
from sana_jax.data.sources import Source, open_source
from sana_jax.data.text_image import CaptionEmbeddings, CaptionTokens, TextImageTransform
from sana_jax.data.transforms import BucketTransform, ImageTransform, StoredLatents
from sana_jax.errors import UserError
from sana_jax.pipeline import SanaPipeline
from sana_jax.training.loop import LoopConfig, fit, jit_step
from sana_jax.training.metrics_writer import MetricsWriter
from sana_jax.training.state import TrainState, on_mesh
from sana_jax.training.text_to_image import Frozen
from sana_jax.training.text_to_image_model import (
    complete,
    make_task,
    open_base,
    open_encoder,
    open_start,
)

# What may change from one run in a folder to the next. Names of checkpoints may, for it is their
# fingerprints that count.
FREE = (
    *("loop.*", "loader.*", "keep", "keep_every", "evaluation.*", "images.*", "mesh.*", "remat"),
    *("peak_flops", "data.data_dir", "autoencoder", "start", "text_encoder.checkpoint"),
    "text_encoder.tokenizer",
)
SHEET_COLUMNS = 8


class TextToImageTraining:
    """A config made ready: what it names is there and fits together; nothing is written yet."""

    def __init__(self, config: ConfigDict, workdir: str):
        """Raises UserError, naming the key, for what cannot be trained."""
        self.config, self.workdir = config, epath.Path(workdir)
        self.mesh = sharding.make_mesh(**config.mesh, devices=jax.devices())
        self.base, self.fingerprints = open_base(config)
        instruction = self.base.instruction
        self.captions = CaptionTokens(
            self.base.tokenizer, self.base.text_rows, instruction and instruction.text
        )
        self.task = make_task(config, self.base, self.captions)
        try:
            self.loop = LoopConfig(steps=config.recipe.steps, **config.loop)
        except TypeError as error:
            raise UserError(f"config.loop: {error}") from None
        self.size = config.data.size or self.base.dit.sample_size * self.base.vae.factor
        self._check()
        self.loader = self._loader(config.data.train_split, config.data.crop, config.data.flip)
        if self.loop.evaluate_every:
            self.held_out = self._loader(config.data.test_split, "centre", flip=False)

    def run(self) -> None:
        """Trains what is left to train. Raises what `loop.fit` does."""
        numbers = "float32" if self.config.dtype == "float32" else None
        with jax.set_mesh(self.mesh), jax.default_matmul_precision(numbers):
            self._run()

    def _run(self) -> None:
        config, steps = self.config, self.loop.steps
        about = config.to_dict() | {"fingerprints": self.fingerprints}
        free = FREE + (("recipe.steps",) * (config.recipe.optimizer.schedule == "constant"))
        batches, data = iter(self.loader), self.loader.fingerprint
        abstract, create = on_mesh(lambda: self.task.init(jax.random.key(config.seed)), self.mesh)
        with Checkpoints(
            self.workdir, about, data, config.keep, config.keep_every, free
        ) as checkpoints:
            state = checkpoints.restore(abstract, batches) or self._start(create)
            if int(state.step) > steps:
                raise UserError(
                    f"{self.workdir} has {int(state.step)} steps already, more than"
                    f" config.recipe.steps={steps}"
                )
            step = jit_step(self.task.step, abstract, self._frozen)
            with MetricsWriter(self.workdir, int(state.step), steps) as writer:
                state = fit(
                    *(step, state, batches, self.mesh, self.loop, checkpoints, writer),
                    on_images=partial(self._draw, writer),
                    on_evaluate=partial(self._evaluate, writer),
                    peak_rate=self._peak_rate(),
                )
            self._export(state)

    def _check(self) -> None:
        """Raises UserError for figures that do not fit together."""
        recipe, config = self.task.recipe, self.config
        parts = recipe.microbatches * recipe.encoder_microbatches
        divisor = sharding.batch_divisor(self.mesh) * max(parts, 1)
        if recipe.batch_size < 1 or parts < 1 or recipe.batch_size % divisor:
            raise UserError(
                f"config.recipe.batch_size={recipe.batch_size}: it is a multiple of {divisor}, the"
                " devices that split it times the microbatches and the encoder's"
            )
        if sharding.batch_divisor(self.mesh) % jax.process_count():
            raise UserError(
                f"config.mesh: replica x fsdp is a multiple of {jax.process_count()}, the hosts:"
                " each reads rows of its own"
            )
        side = self.base.vae.factor * self.base.dit.patch_size
        if self.size % side:
            raise UserError(f"config.data.size={self.size}: it is a multiple of {side}")
        if self.loop.images_every and not config.images.prompts:
            raise UserError("config.images.prompts is empty: give some, or loop.images_every=0")
        if self.loop.evaluate_every and not (
            config.evaluation.batches > 0 and all(0 < s <= 1 for s in config.evaluation.sigmas)
        ):
            raise UserError("config.evaluation: give batches above 0, and sigmas in (0, 1]")

    def _loader(self, split: str, crop: str, flip: bool) -> TrainingLoader:
        """Batches of a split."""
        config, data = self.config, self.config.data
        source, order = self._source(split), None
        options = {"crop": crop, "flip": flip, "upscale": data.upscale}
        table = buckets.training_buckets(self.size) if data.buckets else ()
        text = self.captions
        if isinstance(source, Precomputed):
            image = StoredLatents()
            text = CaptionEmbeddings(source.rows) if source.rows else text
        elif data.buckets:
            image = BucketTransform(table, **options)
        else:
            image = ImageTransform(self.size, self.size, **options)
        batch_size, seed = self.task.recipe.batch_size, config.seed
        if data.buckets or isinstance(source, Precomputed):
            order = bucket_order(source, table, batch_size, seed, upscale=data.upscale)
        try:
            choice = CaptionChoice(**data.captions.to_dict())
        except TypeError as error:
            raise UserError(f"config.data.captions: {error}") from None
        return TrainingLoader(
            source,
            TextImageTransform(image, text, choice),
            batch_size=batch_size,
            seed=seed,
            order=order,
            shard_index=jax.process_index(),
            shard_count=jax.process_count(),
            **config.loader,
        )

    def _source(self, split: str) -> Source:
        data = self.config.data
        folder = data.data_dir or str(self.workdir / "data")
        if data.source == "shapes":
            from sana_jax.data import shapes  # what draws is not needed for other sources

            if jax.process_index() == 0:
                wanted = data.shapes.train, data.shapes.test, data.shapes.seed
                shapes.prepare(folder, self.size, *wanted)
            multihost_utils.sync_global_devices("shapes")
        source = open_source(data.source, split, folder, self.size)
        if isinstance(source, Precomputed):
            self._check_precomputed(source)
        return source

    def _check_precomputed(self, source: Precomputed) -> None:
        """Raises UserError where another autoencoder, or another instruction, made the data."""
        vae = weights_sha256(self.base.vae, self.base.params["vae"])
        if source.index["autoencoder"] != vae:
            raise UserError(
                f"{source.folder} is not of config.autoencoder={self.config.autoencoder}"
            )
        if source.rows and source.index["text"] != json.loads(json.dumps(self.captions.settings)):
            raise UserError(
                f"{source.folder} has embeddings of another tokenizer, instruction or number of"
                " rows than config.text_encoder"
            )
        if source.rows and self.config.text_encoder.train:
            raise UserError(
                f"{source.folder} has embeddings, which a text encoder that trains cannot use"
            )

    @cached_property
    def _frozen(self) -> Frozen:
        """What does not train, on the devices."""
        base, params = self.base, {}
        for name in base.params:
            dtype = component_dtype(name, self.config.dtype)
            params[name] = place(base.params[name], getattr(base, name), dtype, self.mesh)
        if "text_encoder" not in params:
            return Frozen(params["vae"])
        everywhere = NamedSharding(self.mesh, P())
        read = jax.jit(self.task.read_constants, out_shardings=everywhere)
        return Frozen(params["vae"], params["text_encoder"], *read(params["text_encoder"]))

    def _start(self, create) -> TrainState:
        """The state of step 0, with the weights that the config names."""
        state, params = create(), {}
        if self.config.start:
            params["dit"] = place(open_start(self.config)[0], self.base.dit, "float32", self.mesh)
        if self.config.text_encoder.train and self.config.text_encoder.checkpoint:
            weights = open_encoder(self.config)
            params["text_encoder"] = place(weights, self.base.text_encoder, "float32", self.mesh)
        params = state.params | params
        return state.replace(params=params, ema=jax.tree.map(jnp.copy, params))

    def _draw(self, writer: MetricsWriter, state: TrainState, step: int) -> None:
        """The validation prompts' images, by the moving average."""
        settings = self.config.images.to_dict()
        prompts, seed = list(settings.pop("prompts")), settings.pop("seed")
        model = complete(self.base, {**self._frozen_params(), **state.ema}, step, ema=True)
        pipe = SanaPipeline(model, self.mesh, self.config.dtype)
        images = pipe(
            prompts, height=self.size, width=self.size, seed=seed, output="device", **settings
        )
        images = list(np.asarray(_gathered(images)))
        rows = [images[i : i + SHEET_COLUMNS] for i in range(0, len(images), SHEET_COLUMNS)]
        writer.images(step, "samples", rows)

    def _frozen_params(self) -> dict[str, Any]:
        frozen = {"vae": self._frozen.vae, "text_encoder": self._frozen.text_encoder}
        return {name: params for name, params in frozen.items() if params is not None}

    def _evaluate(self, writer: MetricsWriter, state: TrainState, step: int) -> None:
        """The moving average's error on held-out data, at fixed noise levels and noise."""
        errors = {sigma: [] for sigma in self.config.evaluation.sigmas}
        for number, batch in enumerate(self._held_out):
            key = jax.random.fold_in(jax.random.key(self.config.seed), number)
            for sigma in errors:
                error = self._error_at(state.ema, batch, self._frozen, sigma, key)
                errors[sigma].append(float(error))
        row = {f"held_out_loss_{sigma:g}": np.mean(found) for sigma, found in errors.items()}
        writer.write(step, {"held_out_loss": np.mean(list(row.values()))} | row)

    @cached_property
    def _error_at(self):
        return jax.jit(self.task.error_at)

    @cached_property
    def _held_out(self) -> list[Any]:
        where = sharding.batch_sharding(self.mesh)
        put = partial(jax.make_array_from_process_local_data, where)
        numbers = range(self.config.evaluation.batches)
        return [jax.tree.map(put, self.held_out.batch(number)) for number in numbers]

    def _peak_rate(self) -> float | None:
        """Images/s of all devices at their peak, by the FLOPs that the networks need."""
        peak = self.config.peak_flops or flops.peak(jax.devices()[0])
        if not peak:
            return None
        base, batch = self.base, self.loader.batch(0)
        side = self.size // base.vae.factor
        each = 3 * flops.trunk(base.dit, side, side, base.text_rows)  # forward, and twice back
        if "image" in batch:
            each += flops.encode(base.vae, self.size, self.size)
        if "tokens" in batch:
            passes = 3 if self.config.text_encoder.train else 1
            each += passes * flops.text(base.text_encoder, batch["tokens"].shape[1])
        return peak * jax.device_count() / each

    def _export(self, state: TrainState) -> None:
        """WORKDIR/model; one that a killed run left half is replaced."""
        params = jax.tree.map(_gathered, state.ema)
        if jax.process_index() == 0 and "://" not in str(self.workdir):
            folder = native.local(self.workdir / "model")
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            native.save(complete(self.base, params, int(state.step), ema=True), folder)
            print(folder, flush=True)
        multihost_utils.sync_global_devices("model")


def _gathered(x: jax.Array) -> Any:
    """An array whole on this host."""
    return multihost_utils.process_allgather(x, tiled=True) if jax.process_count() > 1 else x
