"""The data of an autoencoder's training: the images of each phase, and those held out."""

from collections.abc import Mapping
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from sana_jax import sharding
from sana_jax.data.images import MAX_PIXELS, MOST_PIXELS
from sana_jax.data.loader import EvaluationLoader, TrainingLoader
from sana_jax.data.memory import InMemory
from sana_jax.data.records import Source
from sana_jax.data.rejections import Budget
from sana_jax.data.sources import check_apart, is_stored, open_source
from sana_jax.data.transforms import ImageTransform
from sana_jax.runtime import hosts
from sana_jax.runtime.checks import within
from sana_jax.runtime.errors import UserError
from sana_jax.training.autoencoder.task import Phase


class AutoencoderData:
    """The data of a config. Pictures of the data set shapes are drawn when first asked for."""

    def __init__(
        self,
        config: ConfigDict,
        folder: Path,
        mesh: Mesh,
        phases: Mapping[str, Phase],
        resumes: bool = False,
    ):
        """Raises UserError if the data does not suffice for a phase; nothing is written.

        Args:
          config: the config of the whole training.
          folder: the data's folder, unless config.data.data_dir is given.
          mesh: the devices, over which a batch is split.
          phases: the phases to run, by name.
          resumes: whether the training has read its data before; Retry is raised if it is away.
        """
        self._config, self._folder, self._mesh, self._resumes = config, folder, mesh, resumes
        self._sources: dict[tuple[str, int], Source] = {}
        self._check(phases)

    def loader(self, phase: Phase, number: int) -> TrainingLoader:
        """Returns the loader of this host's rows for `phase`, which runs as phase `number`."""
        options = self._config.loader.to_dict()
        source = self._source(self._config.data.train_split, phase.image_size)
        return TrainingLoader(
            InMemory(source, int(options.pop("cache_gib") * 2**30), self._config.data.max_pixels),
            transform(phase, self._config.data.max_pixels),
            batch_size=phase.batch_size,
            seed=self._config.seed + number,
            rows=sharding.batch_rows(self._mesh, phase.batch_size),
            budget=Budget(options.pop("bad_fraction")),
            **options,
        )

    def held_out(self, size: int) -> EvaluationLoader:
        """Returns the loader of the held-out images, all of which every host evaluates."""
        evaluation = self._config.evaluation
        return EvaluationLoader(
            self._source(self._config.data.test_split, size),
            ImageTransform(size, size, max_pixels=self._config.data.max_pixels),
            batch_size=evaluation.batch_size,
            limit=evaluation.images,
        )

    def fingerprint(self, phase: Phase) -> str | None:
        """Returns the hash of a phase's images; None for shapes, which the config describes."""
        data = self._config.data
        if data.source == "shapes":
            return None
        return self._source(data.train_split, phase.image_size).fingerprint

    def _source(self, split: str, size: int) -> Source:
        if (split, size) not in self._sources:
            data = self._config.data
            folder = data.data_dir or str(self._folder)
            if data.source == "shapes":
                # Only this source needs the drawing code.
                from sana_jax.shapes.dataset import prepare

                wanted = dict(data.shapes.train)[size], data.shapes.test, data.shapes.seed
                hosts.on_first_host(prepare, folder, size, *wanted)
            resumes = self._resumes and split == data.train_split
            self._sources[split, size] = open_source(data.source, split, folder, size, resumes)
        return self._sources[split, size]

    def _check(self, phases: Mapping[str, Phase]) -> None:
        """Raises UserError if the data does not suffice for a phase; nothing is written."""
        data, evaluation = self._config.data, self._config.evaluation
        within("config.data.max_pixels", data.max_pixels, 1, MOST_PIXELS)
        if is_stored(data.source):
            raise UserError(f"config.data.source={data.source}: these are latents; give images")
        if data.source == "shapes":
            sizes = {size: 1 for size in evaluation.sizes}
            for phase in phases.values():
                size = phase.image_size
                sizes[size] = max(sizes.get(size, 1), phase.batch_size)
            for size, least in sizes.items():
                if dict(data.shapes.train).get(size, 0) < least:
                    more = f", COUNT {least} or more" if least > 1 else ""
                    raise UserError(
                        f"config.data.shapes.train={data.shapes.train}: give ({size}, COUNT)"
                        f" too{more}"
                    )
            return
        for name, phase in phases.items():
            key = f"config.phases.{name}"
            source = self._source(data.train_split, phase.image_size)
            for size in evaluation.sizes:
                held_out = self._source(data.test_split, size)
                check_apart(source, held_out, data.train_split, data.test_split)
            if len(source) < phase.batch_size:
                raise UserError(
                    f"{key}.batch_size={phase.batch_size}: the data has {len(source)} records,"
                    " less than a batch; lower it, or give more data"
                )
            try:
                EvaluationLoader(source, transform(phase, data.max_pixels), batch_size=1)
            except UserError as error:
                raise UserError(f"{key}.image_size={phase.image_size}: {error}") from None


def transform(phase: Phase, max_pixels: int = MAX_PIXELS) -> ImageTransform:
    """Returns how a phase cuts its images out of records. Raises UserError for bad settings."""
    side, cut = phase.image_size, dict(crop=phase.crop, flip=phase.flip)
    return ImageTransform(side, side, **cut, max_pixels=max_pixels)
