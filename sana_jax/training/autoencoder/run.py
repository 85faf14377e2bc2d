"""The phases of an autoencoder's training, one after the other, each in a folder of its own.

    WORKDIR/PHASE/checkpoints, metrics.jsonl, tensorboard/, images/    while it trains
    WORKDIR/PHASE/model/          its moving average when it is over: a native folder
    WORKDIR/PHASE/results.json    held-out figures before and after, the training time
    WORKDIR/model/                the model of the last phase

A phase that has results.json is over; the others resume from their newest checkpoint.
"""

import dataclasses
import fnmatch
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array
from ml_collections import ConfigDict

from sana_jax import sharding
from sana_jax.checkpoints import native
from sana_jax.checkpoints.components import Checkpoint, place
from sana_jax.checkpoints.find import checkpoint_hash, find
from sana_jax.checkpoints.load import open_checkpoint
from sana_jax.data.loader import EvaluationLoader, TrainingLoader
from sana_jax.metrics.reconstruction import to_uint8
from sana_jax.metrics.reconstruction_figures import figures
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.dc_ae_config import DCAEConfig
from sana_jax.pictures import to_float
from sana_jax.runtime import devices, hosts
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import (
    check_readable,
    local,
    read_json,
    replace_folder,
    sha256_of,
    storage,
    write_atomically,
)
from sana_jax.training.autoencoder.data import AutoencoderData
from sana_jax.training.autoencoder.discriminator import Discriminator
from sana_jax.training.autoencoder.perceptual import make_perceptual
from sana_jax.training.autoencoder.recipe import check_figures, check_phase, read_phase
from sana_jax.training.autoencoder.task import AutoencoderTask, Phase
from sana_jax.training.checkpoints.manager import Checkpoints, read_newest
from sana_jax.training.loop import LoopConfig
from sana_jax.training.metrics_writer import MetricsWriter
from sana_jax.training.rows import read_rows
from sana_jax.training.session import Session, computing, export
from sana_jax.training.state import TrainState, on_mesh
from sana_jax.training.watchdog import Watchdog

SHOWN = 8  # images in a sheet of reconstructions
# Keys that may change from one run in a folder to the next; not the steps, on which schedules
# depend. What `data.source`, `start` and `perceptual.weights` name may move: its content is
# compared.
FREE = (
    *("loop.*", "loader.*", "keep", "evaluation.batch_size", "mesh.*", "data.data_dir"),
    *("data.source", "data.max_pixels", "start", "perceptual.weights"),
)


class AutoencoderTraining:
    """A training made ready by its config, whose parts exist and fit; nothing is written yet."""

    def __init__(self, config: ConfigDict, workdir: str):
        """Raises UserError, naming the key, for a config that cannot be trained."""
        check_figures(config)
        self.config, self.workdir = config, local(workdir)
        try:
            self.network = DCAEConfig(**config.network.to_dict())
            dtype = jnp.dtype(config.dtype)
        except (TypeError, ValueError) as error:
            raise UserError(f"--config: {error}") from None
        if not config.run or set(config.run) - set(config.phases):
            known = ", ".join(config.phases)
            raise UserError(f"config.run={config.run}: name some of its phases, {known}")
        phases = {
            name: read_phase(config.phases[name].to_dict(), f"config.phases.{name}")
            for name in config.run
        }
        self.mesh = sharding.make_mesh(**config.mesh, devices=jax.devices())
        distance, weights = make_perceptual(**config.perceptual, dtype=dtype)
        self.perceptual_params = jax.tree.map(self._everywhere, weights)
        files = config.perceptual.weights  # as lpips.load reads them
        self._loss_sha256 = files and [sha256_of(Path(file)) for file in files.split(",")]
        self.model = DCAE(self.network, dtype, jnp.float32, remat=config.remat)
        discriminator = Discriminator(**config.discriminator, dtype=dtype)
        self.tasks = {}
        sizes = config.evaluation.sizes
        if not sizes or any(size % self.network.factor for size in sizes):
            factor = self.network.factor
            raise UserError(f"config.evaluation.sizes={sizes}: give multiples of {factor}")
        for name in config.run:
            check_phase(name, phases[name], self.network, self.mesh)
            try:
                self.tasks[name] = AutoencoderTask(
                    self.model, discriminator, phases[name], distance
                )
            except (ValueError, UserError) as error:  # networks raise ValueError as they are traced
                raise UserError(f"config.phases.{name}: {error}") from None
        running = {name: phases[name] for name in config.run}
        resumes = any(self.workdir.glob("*/checkpoints/[0-9]*"))
        self.data = AutoencoderData(config, self.workdir / "data", self.mesh, running, resumes)
        self._given: tuple[Checkpoint | None, str | None] = None, None
        if config.start:
            self._given = self._open(find(config.start))

        def apply(params: Any, images: Array, method: str = "__call__") -> Array:
            return self.model.apply({"params": params}, images, method=method)

        self._encode = jax.jit(partial(apply, method="encode"))
        # Whole on every host, as each computes the same figures from it.
        self._reconstruct = jax.jit(apply, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    def run(self) -> None:
        """Runs the phases that are left.

        Raises the errors of `loop.fit`, and UserError where a phase that is over was trained by
        another config or from another model.
        """
        before, parent = self._given
        for number, (name, task) in enumerate(self.tasks.items()):
            folder = self.workdir / name
            about = self._about(number, task.phase, parent)
            results = hosts.on_first_host(_read, folder / "results.json")
            if results is not None:
                if changed := self._changed(results, about, task.phase):
                    raise UserError(
                        f"{folder} was trained by another config, or from another model than is"
                        f" there now: {', '.join(changed)} changed; remove it to train it anew"
                    )
                logging.warning("phase %s is over; remove %s to repeat it", name, folder)
                if not hosts.on_first_host(native.is_whole, folder / "model"):
                    self._export_again(folder, task.phase, results, before)
            else:
                with computing(self.mesh, self.config.dtype):
                    self._run_phase(name, number, task, before, about)
            before, parent = self._open(folder / "model")
        if _is_first():
            with storage(self.workdir):
                _copy_model(folder / "model", self.workdir / "model")

    def _everywhere(self, array: np.ndarray) -> Array:
        """Puts an array on every device once, so that no step sends it from the host."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        return jax.make_array_from_callback(array.shape, whole, lambda index: array[index])

    def _about(self, number: int, phase: Phase, parent: str | None) -> dict[str, Any]:
        """Returns the config of one phase and the model it starts from, as read back from JSON."""
        about = {key: value for key, value in self.config.to_dict().items() if key != "phases"}
        about |= {"run": self.config.run[: number + 1], "from": parent}
        if self._loss_sha256:
            about["perceptual_weights"] = self._loss_sha256
        phase = dataclasses.asdict(phase)
        if not phase["l2"]:  # runs that began before this loss existed have none
            del phase["l2"]
        return json.loads(json.dumps(about | {"phase": phase}))

    def _changed(self, results: dict[str, Any], about: dict[str, Any], phase: Phase) -> list[str]:
        """Returns the keys by which a phase that is over differs from what the config asks for."""
        # Keys that are free now may not have been free when the phase ran.
        then, now = _fixed(results.get("about", {})), _fixed(about)
        if "data" in results:
            then["data.source"] = results["data"]
            now["data.source"] = self.data.fingerprint(phase)
        else:  # of a run of before, which compared names alone
            then["data.source"] = results.get("about", {}).get("data", {}).get("source")
            now["data.source"] = about["data"]["source"]
        return [key for key in now | then if then.get(key) != now.get(key)]

    def _open(self, folder: Path) -> tuple[Checkpoint, str]:
        """Returns a model that a phase starts from, and its hash."""
        checkpoint = open_checkpoint(str(folder))
        known = dataclasses.replace(self.network, scaling_factor=checkpoint.vae.scaling_factor)
        if checkpoint.vae != known:
            raise UserError(f"{folder} is of another config.network; use it there")
        return checkpoint, checkpoint_hash(folder)

    def _run_phase(
        self,
        name: str,
        number: int,
        task: AutoencoderTask,
        before: Checkpoint | None,
        about: dict[str, Any],
    ) -> None:
        config, folder, phase = self.config, self.workdir / name, task.phase
        loader = self.data.loader(phase, number)
        held_out = {size: self.data.held_out(size) for size in config.evaluation.sizes}
        loop = LoopConfig(steps=phase.steps, **config.loop)
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        abstract, create = on_mesh(lambda: task.init(key), self.mesh)
        sheet = to_float(next(iter(held_out[min(held_out)]))["image"][:SHOWN])

        def draw(writer: MetricsWriter, state: TrainState, step: int) -> None:
            pairs = sheet, self._reconstruct(state.ema, sheet)
            rows = [list(np.asarray(to_uint8(images))) for images in pairs]
            writer.images(step, "reconstructions", rows)

        with Checkpoints(folder, about, loader.fingerprint, config.keep, free=FREE) as checkpoints:
            called = {"key": f"config.phases.{name}.steps", "name": name}
            session = Session(checkpoints, loader, self.mesh, loop, **called)
            state = session.begin(abstract, lambda: self._start(create, before))
            # A run cut short before its first checkpoint may leave the figures of another model.
            if not session.first or hosts.on_first_host(_read, folder / "before.json") is None:
                hosts.log_first_host(f"{name}: measuring the held-out images")
                start = self._start(create, before) if session.first else state
                _write(folder / "before.json", self._figures(start.ema, held_out))
                del start
            state = session.fit(
                state,
                [task.step],
                lambda: (self.perceptual_params,),
                on_images=draw,
                images_at_end=True,
            )
            hosts.log_first_host(f"{name}: measuring the latents and the held-out images")
            factor = before.vae.scaling_factor if before else self.network.scaling_factor
            if any(jax.tree.leaves(task.mask["encoder"])):  # otherwise the latents have not changed
                factor = self._scaling_factor(state.ema, loader)
            results = {
                "phase": name,
                "about": _fixed(about),
                "steps": phase.steps,
                "images": phase.steps * phase.batch_size,
                "skipped_updates": int(state.skipped),
                "training_seconds": round(hosts.on_first_host(_training_seconds, folder, phase)),
                "devices": devices.describe(),
                "scaling_factor": factor,
                "before": read_json(folder / "before.json"),
                "after": self._figures(state.ema, held_out),
            }
            with Watchdog(loop.watchdog_seconds):
                self._export(folder, state.ema, results, before)
            fingerprint = self.data.fingerprint(phase)
            _write(folder / "results.json", results | {"data": fingerprint})
            if _is_first():
                for size, row in results["after"].items():
                    print(
                        f"{name}, {row['count']} held-out images at {size} px:"
                        f" PSNR {row['psnr']:.2f} dB, SSIM {row['ssim']:.4f}"
                    )
                print(f"{folder / 'model'}", flush=True)

    def _start(self, create, before: Checkpoint | None) -> TrainState:
        """Returns the state of step 0, with the autoencoder of the phase before."""
        state = create()
        if before is None:
            return state
        params = place(before.params["vae"], before.vae, "float32", self.mesh)
        return state.replace(
            params={**state.params, "autoencoder": params}, ema=jax.tree.map(jnp.copy, params)
        )

    def _figures(self, params: Any, held_out: dict[int, EvaluationLoader]) -> dict[str, Any]:
        """Returns the figures on held-out images, by image size."""
        reconstruct = partial(self._reconstruct, params)
        values = self.network.latent_channels / self.network.factor**2

        def row(loader: EvaluationLoader) -> dict[str, Any]:
            # A watchdog for each size, which compiles before its first beat.
            with Watchdog(self.config.loop.watchdog_seconds) as dog:
                return figures(reconstruct, loader, values, on_batch=lambda count: dog.beat())

        return {str(size): row(loader) for size, loader in held_out.items()}

    def _scaling_factor(self, params: Any, loader: TrainingLoader) -> float:
        """Returns 1 / root mean square of the latents of the phase's training images."""
        squares = []
        with Watchdog(self.config.loop.watchdog_seconds) as dog:
            for step in range(max(1, self.config.scale_images // loader.batch_size)):
                rows = sharding.put_batch(loader.batch(step)["image"], self.mesh)
                latents = self._encode(params, to_float(rows))
                squares.append(float(jnp.mean(jnp.square(latents))))
                dog.beat()
        return float(1 / np.sqrt(np.mean(squares)))

    def _export(self, folder: Path, params: Any, results: dict, before: Checkpoint | None) -> None:
        """Writes the parameters as a native folder, whose provenance lists their phases."""
        network = dataclasses.replace(self.network, scaling_factor=results["scaling_factor"])
        made = before.provenance if before else {}
        history = made.get("autoencoder", made).get("phases", [])  # a whole model has it by part
        provenance = {"trained": True, "phases": [*history, results]}
        model = Checkpoint(
            network, params={"vae": hosts.gather_arrays(params)}, provenance=provenance
        )
        export(model, folder / "model")

    def _export_again(
        self, folder: Path, phase: Phase, results: dict, before: Checkpoint | None
    ) -> None:
        """Writes the model of a phase that is over from its last checkpoint. Raises UserError."""
        hosts.log_first_host(f"{folder / 'model'} is damaged or gone: it is written again")
        gone = (
            f"{folder / 'model'} is damaged or gone, and so is the checkpoint of step"
            f" {phase.steps}: bring one back, or remove {folder} to train it anew"
        )
        try:
            document, params = read_newest(folder, "ema")
        except UserError as error:
            raise UserError(gone) from error
        if document["step"] != phase.steps:
            raise UserError(gone)
        results = {key: value for key, value in results.items() if key != "data"}
        self._export(folder, params, results, before)


def _fixed(about: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Returns `about` without the keys that are FREE."""
    return {
        key: _fixed(value, f"{above}{key}.") if isinstance(value, dict) else value
        for key, value in about.items()
        if not any(fnmatch.fnmatch(above + key, glob) for glob in FREE)
    }


def _copy_model(model: Path, target: Path) -> None:
    """Copies `model` to `target`, completely or not at all, unless it is already there, whole."""
    if native.is_whole(target) and checkpoint_hash(target) == checkpoint_hash(model):
        return
    with replace_folder(target) as part:
        shutil.copytree(model, part, dirs_exist_ok=True)


def _training_seconds(folder: Path, phase: Phase) -> float:
    """Returns the time of all steps, also before restarts, without pauses, by the metrics."""
    seconds, last = 0.0, 0
    for row in read_rows(epath.Path(folder)):
        rate = row.get("images_per_second")
        if isinstance(rate, int | float) and rate > 0:
            seconds += (row["step"] - last) * phase.batch_size / rate
        last = row["step"]
    return seconds


def _read(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file of ours; None if it is missing or damaged."""
    if not path.exists():
        return None
    check_readable(path)
    try:
        return read_json(path)
    except UserError as error:
        hosts.log_first_host(f"{error}: it is made anew")
        return None


def _write(path: Path, contents: dict[str, Any]) -> None:
    """Writes a JSON file on the first host; it appears as a whole or not at all."""
    content = (json.dumps(contents, indent=2) + "\n").encode()
    with storage(path):
        hosts.on_first_host(write_atomically, epath.Path(path), content)


def _is_first() -> bool:
    return jax.process_index() == 0
