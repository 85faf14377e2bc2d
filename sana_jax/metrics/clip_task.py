"""Measures pictures in CLIP's space: evaluate --task=clip_score and --task=cmmd."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from sana_jax import sharding
from sana_jax.checkpoints.clip import CLIPCheckpoint, open_clip
from sana_jax.metrics import features
from sana_jax.metrics.features import Features, Network, Prepared
from sana_jax.metrics.kernel_distances import SCALE, SIGMA, cmmd
from sana_jax.metrics.pictures import open_pictures
from sana_jax.metrics.resizes import clip_input
from sana_jax.models.clip import unit

HUNDRED = 100.0  # the scale that OpenAI's networks learned, and at which their training held it


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything that decides the figures."""

    data: str  # the pictures: a folder, or that of a batch run
    weights: str  # a folder of CLIP, as transformers writes it
    reference: str | None = None  # a folder; of CMMD alone
    count: int | None = None  # the first pictures of either folder; None: all
    batch_size: int = 16
    dtype: str = "float32"
    jpeg: bool = False  # measure `data` as if it were stored as JPEG
    workdir: str | None = None  # where features are kept; None: nowhere


def clip_score(options: Options, draw: Callable[[], None] | None = None) -> dict[str, Any]:
    """Returns the mean of 100 x the cosine of picture and prompt, for JSON.

    `draw` is called once all else has been checked, and fills the folder of the pictures. Raises
    UserError.
    """
    scores, data, about = score_pictures(options, draw)
    error = scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else None
    figures = {"clip_score": scores.mean(), "standard_error": error}
    figures = {name: value if value is None else float(value) for name, value in figures.items()}
    return about | figures | data.about()


def score_pictures(
    options: Options, draw: Callable[[], None] | None = None
) -> tuple[Float[np.ndarray, " N"], Features, dict[str, Any]]:
    """Returns 100 x the cosine of each picture and its prompt, and what decided it, for JSON.

    The features count the pictures that could not be measured, which have no score. Raises
    UserError.
    """
    opened = open_clip(options.weights)
    tokenizer = opened.tokenizer()

    def tokenize(text: str) -> np.ndarray:
        return opened.tokenize([text], tokenizer)[0]

    def score(module, params, batch):
        image = module.apply(params, batch["image"], method="encode_image")
        text = module.apply(params, batch["tokens"], method="encode_text")
        return HUNDRED * (unit(image) * unit(text)).sum(axis=-1, keepdims=True)

    with _measured(options, opened, "clip", score, draw, tokenize) as (found, about):
        data = found["data"]
        return data.some(len(data)).astype(np.float64)[:, 0], data, about


def image_distance(options: Options, draw: Callable[[], None] | None = None) -> dict[str, Any]:
    """Returns CMMD, for JSON, as `clip_score` does. Raises UserError."""

    def embed(module, params, batch):
        return unit(module.apply(params, batch["image"], method="encode_image"))

    with _measured(options, open_clip(options.weights), "cmmd", embed, draw) as (found, about):
        data, reference = found["data"], found["reference"]
        figures = {"cmmd": cmmd(data.some(), reference.some()), "sigma": SIGMA, "scale": SCALE}
    return about | figures | data.about() | reference.about("reference_")


@contextlib.contextmanager
def _measured(
    options: Options,
    opened: CLIPCheckpoint,
    kind: str,
    compute: Any,
    draw: Callable[[], None] | None,
    tokenize: Any = None,
) -> Iterator[tuple[dict[str, Features], dict[str, Any]]]:
    """Yields the features of every folder, and what decided them."""
    sources = {}
    if options.reference is not None:
        sources["reference"] = open_pictures(options.reference, "reference")
    if draw is not None:
        draw()
    sources["data"] = open_pictures(options.data, "data")
    mesh = sharding.make_mesh()
    side = opened.config.image_size
    decides = {"preprocess": kind, "side": side, "mean": opened.mean, "std": opened.std}
    prepare = clip_input(kind, side, opened.mean, opened.std)
    about = {"features": kind, "weights_sha256": opened.sha256(), "dtype": options.dtype}

    def network() -> Network:
        params = {"params": opened.place(mesh, options.dtype, None if tokenize else "vision")}
        return features.on_mesh(partial(compute, opened.module(options.dtype)), params, mesh)

    with features.workdir(options.workdir) as folder:
        found = {
            name: features.measure(
                source,
                Prepared(prepare, decides, tokenize, options.jpeg and name == "data"),
                network,
                folder,
                about,
                batch_size=sharding.whole_batch(options.batch_size, mesh),
                count=options.count,
            )
            for name, source in sources.items()
        }
        yield found, about | decides | dataclasses.asdict(options)


def table(found: dict[str, Any]) -> str:
    """Formats the figure for people."""
    if "cmmd" in found:
        return f"CMMD        {found['cmmd']:.4f}"
    error = found["standard_error"]
    sure = "" if error is None else f" +- {error:.4f}, a standard error"
    return f"CLIP score  {found['clip_score']:.4f}{sure}"
