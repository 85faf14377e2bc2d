"""Takes the outliers out of rows before they are rounded to int8 (SmoothQuant, arXiv 2211.10438).

Of a product X W, channel c of the rows X is divided by a number, and row c of W multiplied by it:

    s_c = max |X_c|^(1/2) / max |W_c|^(1/2)                                (eq. 4, alpha = 1/2)

so that no channel of either needs much more of int8's range than the others. The weights that make
X take the division, which costs nothing when the network runs: those of Mix-FFN's value, in which
its second product is linear. Each s is rounded to a power of two, so that a network in float32 or
bfloat16 computes the same bits as before. (Weights in float16 that become smaller than 6e-5 lose
their last bits.)

The rows of the other products are not so: of those with values of an attention it did not help
(quantisation/README.md), the modulation of norms is shared by the layers, and the queries of the
cross-attention are made of the residual stream itself.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np
from flax import traverse_util

from sana_jax.checkpoints.components import Checkpoint
from sana_jax.checkpoints.mapping import cast
from sana_jax.checkpoints.tensors import LazyArray
from sana_jax.models.dit import SanaConfig
from sana_jax.runtime.errors import UserError

# By product, the weights that make its rows, in the first half of their last axis.
SOURCES = {"blocks/ffn/contract": ("blocks/ffn/depthwise_kernel", "blocks/ffn/depthwise_bias")}


def products(config: SanaConfig, layers: Iterable[str]) -> list[str]:
    """Returns a transformer's products among `layers` whose rows can be smoothed.

    Raises UserError if there is none.
    """
    if config.ffn != "glumbconv":
        raise UserError(f"--smooth is for Mix-FFN; the transformer's ffn is {config.ffn}")
    if not (found := sorted({*SOURCES} & {*layers})):
        raise UserError(f"--smooth: none of {', '.join(SOURCES)} is w8a8")
    return found


def smooth(checkpoint: Checkpoint, ranges: Mapping[str, np.ndarray]) -> Checkpoint:
    """Returns the checkpoint with smoothed rows; its weights stay unread but for their ranges.

    `ranges` are the largest numbers in the rows of `products`, (layers, C), by
    pipeline/calibrate.py.
    """
    flat = traverse_util.flatten_dict(checkpoint.params["dit"], sep="/")
    for name, largest in ranges.items():
        kernel = flat[f"{name}/kernel"]
        factor = factors(largest, kernel)
        flat[f"{name}/kernel"] = _times(name, kernel, factor[..., None])
        inverse = np.concatenate([1 / factor, np.ones_like(factor)], axis=-1)
        for path in SOURCES[name]:
            weight = flat[path]
            between = (1,) * (len(weight.shape) - 2)
            flat[path] = _times(path, weight, inverse.reshape(len(inverse), *between, -1))
    params = {**checkpoint.params, "dit": traverse_util.unflatten_dict(flat, sep="/")}
    return dataclasses.replace(checkpoint, params=params)


def is_smoothed(checkpoint: Checkpoint) -> bool:
    return "smoothing" in checkpoint.provenance.get("quantised", {})


def check_sites(what: str, sites: Iterable[str]) -> None:
    """Raises UserError for LoRAs at `sites` of smoothed weights whose rows are others."""
    if found := sorted({*SOURCES} & {*sites}):
        raise UserError(
            f"{what}: the rows of {found[0]} are smoothed (convert --smooth): leave it out, or"
            " begin with weights that are not smoothed"
        )


def factors(largest: np.ndarray, kernel: LazyArray) -> np.ndarray:
    """Returns s, (layers, C), in float32; 1 for a channel that is zero in the rows or weights."""
    weights = np.stack([np.abs(layer).max(-1).astype(np.float32) for layer in np.asarray(kernel)])
    zero = (largest == 0) | (weights == 0)
    # Of logarithms, since the ratio itself may overflow.
    ratio = np.log2(np.where(zero, 1, largest)) - np.log2(np.where(zero, 1, weights))
    return np.exp2(np.round(ratio / 2)).astype(np.float32)


def _times(name: str, array: LazyArray, factor: np.ndarray) -> LazyArray:
    """Returns an unread array times powers of two, in the array's dtype."""

    def load(dtype: np.dtype) -> np.ndarray:
        made = np.empty(array.shape, dtype)
        # A layer at a time; in float32, as float16 does not hold all factors.
        for i, layer in enumerate(np.asarray(array)):
            made[i] = cast(name, layer * factor[i], dtype)
        return made

    return LazyArray(array.shape, np.dtype(array.dtype), load)
