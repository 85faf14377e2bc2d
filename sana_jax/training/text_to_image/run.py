"""A text-to-image training, from a config to a model.

    WORKDIR/checkpoints, metrics.jsonl, tensorboard/, images/    while it trains
    WORKDIR/model/                  its moving average: a native folder, or the file of its LoRA

Before the first step, and before anything but pictures of the data set shapes or of config.prior
is written, everything that the config names is opened and everything that can be wrong with it is
checked.
"""

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from sana_jax import sharding
from sana_jax.checkpoints.components import place
from sana_jax.data.first_look import first_captions
from sana_jax.data.precomputed import Precomputed
from sana_jax.data.text_image import CaptionTokens
from sana_jax.models import flops
from sana_jax.models.dit import SanaConfig
from sana_jax.pictures import in_rows
from sana_jax.pipeline.pipeline import SanaPipeline
from sana_jax.runtime import checks, hosts
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import is_local, storage
from sana_jax.training.checkpoints.manager import Checkpoints
from sana_jax.training.config_types import check_types
from sana_jax.training.loop import LoopConfig
from sana_jax.training.metrics_writer import MetricsWriter
from sana_jax.training.session import Session, computing
from sana_jax.training.state import TrainState, on_mesh
from sana_jax.training.text_to_image.abstract import flops_of_row
from sana_jax.training.text_to_image.data import make_loaders
from sana_jax.training.text_to_image.networks import (
    frozen_dtype,
    make_task,
    open_base,
    open_encoder,
    open_once,
    open_start,
)
from sana_jax.training.text_to_image.recipe import check_batches, check_figures, text_to_image
from sana_jax.training.text_to_image.result import complete, steps_of, write
from sana_jax.training.text_to_image.start import leave_open, resolve
from sana_jax.training.text_to_image.task import Frozen, TextToImageTask

# Keys that may change from one run in a folder to the next. Names of checkpoints and of the data
# may, since their hashes are compared, and the limit of pixels, which the loader's fingerprint
# has; but not the name `start`, whose folder is opened again only if it stays beside what trains.
FREE = (
    *("loop.*", "loader.*", "keep", "keep_every", "evaluation.*", "images.*", "mesh.*", "remat"),
    *("unroll", "peak_flops", "data.data_dir", "data.source", "data.max_pixels", "autoencoder"),
    *("text_encoder.checkpoint", "text_encoder.tokenizer"),
)
SHEET_COLUMNS = 8  # images in a row of a sheet of validation images


class TextToImageTraining:
    """A training made ready by its config: everything that the config names exists and fits.

    Nothing is written yet, except the data set shapes, the sizes of images and the pictures of
    config.prior, which come last.
    """

    recipe = staticmethod(text_to_image)  # has all keys of a config

    def __init__(self, config: ConfigDict, workdir: str):
        """Raises UserError, naming the key, for a config that cannot be trained."""
        if "phases" in config:
            raise UserError("--config is of an autoencoder: it is for sana_jax.train_dc_ae")
        recipe = self.recipe(SanaConfig(), 1, 1)
        check_types(config, leave_open(recipe.copy_and_resolve_references()), but=["network"])
        self._opener = open_once()
        config = resolve(config, self._opener)
        later = ["prompts"] if config.images.prompts is None else []
        check_types(config, recipe, but=["network", *later])
        self.config, self.workdir = config, epath.Path(workdir)
        self.mesh = sharding.make_mesh(**config.mesh, devices=jax.devices())
        self.base, self.hashes = open_base(config, self._opener)
        instruction = self.base.instruction
        self.captions = CaptionTokens(
            self.base.tokenizer, self.base.text_rows, instruction and instruction.text
        )
        self.task = self._make_task()
        loop = config.loop.to_dict() | {"steps": config.recipe.steps}
        self.loop = checks.read_group(LoopConfig, loop, "config.loop")
        self.size = config.data.size or self.base.dit.sample_size * self.base.vae.factor
        self._check()
        if not any((self.workdir / "checkpoints").glob("[0-9]*")):
            self._check_start()
        given = config, self.workdir, self.base, self.captions, self.mesh, self.size
        self.loader, *self.held_out = make_loaders(*given, self.task.reader_trains)
        if config.images.prompts is None:
            config.images.prompts = first_captions(self.loader.source, SHEET_COLUMNS // 2)

    def run(self) -> None:
        """Trains the steps that are left, and writes the model. Raises the errors of `loop.fit`."""
        with computing(self.mesh, self.config.dtype):
            self._run()

    def _run(self) -> None:
        config = self.config
        about = config.to_dict() | self._prints()
        free = FREE + (("recipe.steps",) * (config.recipe.optimizer.schedule == "constant"))
        given = about, self.loader.fingerprint, config.keep, config.keep_every, free
        defaults = self.recipe(SanaConfig(), 1, 1).to_dict()
        abstract, create = on_mesh(lambda: self.task.init(jax.random.key(config.seed)), self.mesh)
        with Checkpoints(self.workdir, *given, defaults) as checkpoints:
            session = Session(checkpoints, self.loader, self.mesh, self.loop)
            state = session.begin(abstract, lambda: self._start(create))
            state = session.fit(
                state,
                self.task.steps,
                lambda: (self._frozen,),
                on_images=self._draw,
                on_evaluate=self._evaluate,
                peak_rate=self._peak_rate(),
            )
            self._export(state, session.first)

    def _make_task(self) -> TextToImageTask:
        return make_task(self.config, self.base, self.captions)

    def _prints(self) -> dict[str, Any]:
        """Returns what is compared, beside the config, where a run goes on."""
        return {"fingerprints": self.hashes}  # as runs of before call them

    def _check_start(self) -> None:
        """Raises UserError if a new run cannot start from the weights that the config names."""
        if self.config.start and not self.task.lora.rank:
            open_start(self.config, self._opener)

    def _check(self) -> None:
        """Raises UserError for figures that do not fit together, also those that hooks use."""
        config = self.config
        check_figures(config)
        check_batches(config, self.mesh)
        side = self.base.vae.factor * self.base.dit.patch_size
        if self.size < 1 or self.size % side:
            raise UserError(f"config.data.size={self.size}: it is a multiple of {side}")

    @cached_property
    def _frozen(self) -> Frozen:
        """The frozen networks and what they make of constant text, on the devices."""
        base, params = self.base, {}
        for name in base.params:
            dtype = frozen_dtype(name, self.config.dtype, self.task.recipe.follow_start)
            params[name] = place(base.params[name], getattr(base, name), dtype, self.mesh)
        frozen = Frozen(params["vae"], dit=params.get("dit"))
        if "text_encoder" not in params:
            return frozen
        if self.task.reader_trains:
            return frozen._replace(text_encoder=params["text_encoder"])
        everywhere = NamedSharding(self.mesh, P())
        read = jax.jit(self.task.read_constants, out_shardings=everywhere)
        prefix, null = read(params["text_encoder"])
        return frozen._replace(text_encoder=params["text_encoder"], prefix=prefix, null=null)

    def _start(self, create) -> TrainState:
        """Returns the state of step 0, with the weights that the config names."""
        state, params = create(), {}
        if self.config.start and not self.task.lora.rank:
            weights = open_start(self.config, self._opener)
            params["dit"] = place(weights, self.base.dit, "float32", self.mesh)
        if self.config.text_encoder.train and self.config.text_encoder.checkpoint:
            weights = open_encoder(self.config, self._opener)
            params["text_encoder"] = place(weights, self.base.text_encoder, "float32", self.mesh)
        params = state.params | params
        return state.replace(params=params, ema=jax.tree.map(jnp.copy, params))

    def _draw(self, writer: MetricsWriter, state: TrainState, step: int) -> None:
        """Draws the images of the validation prompts, by the moving average."""
        settings = self.config.images.to_dict()
        prompts, seed = list(settings.pop("prompts")), settings.pop("seed")
        params = {
            name: self.task.network(name, state.ema, self._frozen)
            for name in ("dit", "text_encoder")
        } | {"vae": self._frozen.vae}
        model = complete(self.base, params, step, ema=True)
        pipe = SanaPipeline(model, self.mesh, self.config.dtype)
        pipe.dit = pipe.dit.clone(implementation=self.task.dit.implementation)
        size = dict(height=self.size, width=self.size)
        images, _ = pipe.draw(pipe.request(prompts, seed=seed, **size, **settings))
        images = list(np.asarray(hosts.gather_arrays(images)))
        writer.images(step, "samples", in_rows(images, SHEET_COLUMNS))

    def _evaluate(self, writer: MetricsWriter, state: TrainState, step: int) -> None:
        """Measures the moving average on held-out data, at fixed noise levels and noise."""
        errors = {sigma: [] for sigma in self.config.evaluation.sigmas}
        for number in range(self.config.evaluation.batches):
            batch = sharding.put_batch(self.held_out[0].batch(number), self.mesh)
            key = jax.random.fold_in(jax.random.key(self.config.evaluation.seed), number)
            for sigma in errors:
                error = self._error_at(state.ema, batch, self._frozen, sigma, key)
                errors[sigma].append(float(error))
        row = {f"held_out_loss_{sigma:g}": np.mean(found) for sigma, found in errors.items()}
        writer.write(step, {"held_out_loss": np.mean(list(row.values()))} | row)

    @cached_property
    def _error_at(self):
        return jax.jit(self.task.error_at)

    def _peak_rate(self) -> float | None:
        """Returns images/s of all devices at their peak, by the FLOPs that the networks need."""
        peak = self.config.peak_flops or flops.peak(jax.devices()[0])
        if not peak:
            return None
        source = self.loader.source
        stored = isinstance(source, Precomputed)
        encoded = {"images": not stored, "captions": not (stored and source.rows)}
        return peak * jax.device_count() / flops_of_row(self.task, self.size, **encoded)

    def _export(self, state: TrainState, first: int) -> None:
        """Writes WORKDIR/model, unless it is whole and the run had nothing left from `first`."""
        params, step = hosts.gather_arrays(state.ema), int(state.step)
        if not is_local(self.workdir):
            line = f"python -m sana_jax.convert --source={self.workdir} --out=DIR --ema"
        else:
            line = folder = Path(self.workdir / "model")
            with storage(folder):
                if first < step or hosts.on_first_host(steps_of, folder) != step:
                    write(self.base, params, step, self.task.lora, folder)
        hosts.on_first_host(partial(print, line, flush=True))
