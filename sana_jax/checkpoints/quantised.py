"""Quantises the weights of a checkpoint. They stay unread: each is rounded when it is used."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sana_jax.checkpoints.components import Checkpoint, Config, abstract_params
from sana_jax.checkpoints.mapping import cast
from sana_jax.checkpoints.tensors import LazyArray
from sana_jax.kernels.int8 import Quantised, is_quantised, reference
from sana_jax.quantisation.table import STATIC, Rule, choose, sums_of
from sana_jax.runtime.errors import UserError

PART_BYTES = 2**26  # of a weight, in float32, that are rounded at once


def quantise(
    checkpoint: Checkpoint,
    method: str,
    changes: Sequence[Rule] = (),
    ranges: Mapping[str, np.ndarray] | None = None,
) -> Checkpoint:
    """Returns the checkpoint with int8 weights; its provenance tells which layers stayed.

    Args:
      method: a key of quantisation/table.py's METHODS.
      changes: rules that come before it.
      ranges: the largest numbers in the rows of the transformer's layers, (layers, C), by
        pipeline/calibrate.py: such rows have one scale for each layer.

    Raises UserError if the checkpoint is quantised already or a change cannot be, and, when it is
    read, for a weight with NaN or infinite numbers.
    """
    configs, kept = quantised_configs(checkpoint.configs(), method, changes)
    if ranges is not None:
        static = [(n, STATIC if n in ranges else kind) for n, kind in configs["dit"].quantised]
        configs["dit"] = dataclasses.replace(configs["dit"], quantised=tuple(static))
    params = {
        name: _lazily(name, checkpoint.params[name], config, ranges or {})
        for name, config in configs.items()
    }
    told = {"method": method, "changes": [list(rule) for rule in changes], "kept": list(kept)}
    provenance = {**checkpoint.provenance, "quantised": told}
    return dataclasses.replace(checkpoint, **configs, params=params, provenance=provenance)


def quantised_configs(
    configs: Mapping[str, Config], method: str, changes: Sequence[Rule] = ()
) -> tuple[dict[str, Config], tuple[str, ...]]:
    """Returns networks' configs, by name, with their quantised layers, and the layers that stay."""
    if already := [name for name, config in configs.items() if config.quantised]:
        raise UserError(
            f"{', '.join(already)} is quantised already: begin with what it was made from"
        )
    choice = choose({n: abstract_params(c) for n, c in configs.items()}, method, changes)
    made = {n: dataclasses.replace(c, quantised=choice.quantised[n]) for n, c in configs.items()}
    return made, choice.kept


def _lazily(network: str, params: Any, config: Config, ranges: Mapping[str, np.ndarray]) -> Any:
    """Returns nested parameters whose weights are quantised where the config says so."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for path, box in traverse_util.flatten_dict(abstract_params(config), sep="/").items():
        if is_quantised(box):
            flat[path] = _weight(f"{network}/{path}", flat[path], box, sums_of(path, box))
            if box.range is not None:
                largest = ranges[path.removesuffix("/kernel")].max(-1).astype(np.float32)
                scale = np.reshape(largest / reference.LARGEST, box.range.value.shape)
                lazy = LazyArray(scale.shape, scale.dtype, scale.astype)
                flat[path] = dataclasses.replace(flat[path], range=lazy)
    return traverse_util.unflatten_dict(flat, sep="/")


def _weight(name: str, weight: Any, box: Quantised, axes: tuple[int, ...]) -> Quantised:
    """Returns a weight's values and scales, each of which reads the weight: neither is kept."""

    def parts() -> Iterator[np.ndarray]:
        whole = np.asarray(weight)
        apart = -whole.ndim not in axes  # no scale is for all of axis 0
        count = math.ceil(4 * whole.size / PART_BYTES) if apart else 1
        for part in np.array_split(whole, min(count, len(whole))):
            yield cast(name, part, np.float32)

    def values(dtype: np.dtype) -> np.ndarray:
        made = np.empty(weight.shape, dtype)
        start = 0
        for part in map(jnp.asarray, parts()):
            rounded = reference.values_of(part, reference.scale_of(part, axes))
            made[start : start + len(part)] = rounded
            start += len(part)
        return made

    def scale(dtype: np.dtype) -> np.ndarray:
        found = [np.asarray(reference.scale_of(jnp.asarray(part), axes)) for part in parts()]
        return np.concatenate(found).astype(dtype, copy=False)

    def lazy(box, load) -> LazyArray:
        return LazyArray(box.value.shape, np.dtype(box.value.dtype), load)

    return dataclasses.replace(box, values=lazy(box.values, values), scale=lazy(box.scale, scale))
