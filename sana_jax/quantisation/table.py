"""Which layers of the networks are quantised, and how: one table, which a user may change.

A layer is named by its network and path, as in a native folder: dit/blocks/attention/qkv. Its kind:

    w8    int8 weights, multiplied with rows in float: memory alone is saved
    w8a8  int8 weights, multiplied with int8 rows: a matrix product in integers
    none  left as it is
    w8a8_static  (made by calibration alone) w8a8 with one scale for all rows of a layer

The config of a network names its quantised layers and their kinds (`quantised`), so a folder says
what it holds. What no row of the table matches stays: keys and values of the cross-attention, whose
few rows cost little and which every token reads; depthwise kernels, norms, tables, embedders and
outputs, which are small; the autoencoder's first and last convolutions, which are of pixels.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from sana_jax.kernels.int8 import Quantised, Simulated
from sana_jax.models.config import Layers
from sana_jax.runtime.errors import UserError

PyTree = Any
Rule = tuple[str, str]  # a regular expression of whole names of layers, and their kind
KINDS = "none", "w8", "w8a8"
STATIC = "w8a8_static"
# The parameters that can be quantised, with the axes that a sum is over, from the end: all but the
# last for a kernel, and for a table of rows to look up, one row.
NAMES = {"kernel": None, "embedding": (-1,)}

_TRANSFORMER = r"dit/blocks/(attention/(qkv|out)|cross_attention/(q|out)|ffn/(expand|contract))"
_OTHERS: tuple[Rule, ...] = (
    (r"text_encoder/(embed|layers/.*)", "w8"),
    (r"vae/(encoder|decoder)/stage_\d+/.*", "w8"),
)
STAYS = "", "none"
# By method, the rules that decide; the first that matches a layer.
METHODS: dict[str, tuple[Rule, ...]] = {
    "w8": ((_TRANSFORMER, "w8"), *_OTHERS),
    "w8a8": ((_TRANSFORMER, "w8a8"), *_OTHERS),
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The layers of some networks that are quantised, and those that could be and stay."""

    quantised: dict[str, Layers]  # by network
    kept: tuple[str, ...]  # whole names


def choose(networks: Mapping[str, PyTree], method: str, changes: Sequence[Rule] = ()) -> Choice:
    """Returns how every layer of `networks` is to be stored.

    Args:
      networks: the abstract parameters of each, boxed, without quantised layers.
      method: a key of METHODS.
      changes: rules that come before the method's.

    Raises UserError for a change that matches nothing, is no regular expression, or asks for a
    product that there is not, and if nothing is left to quantise.
    """
    rules, unused, found, kept, names = (*changes, *METHODS[method]), set(changes), {}, [], []
    for network, params in networks.items():
        layers = []
        for layer, path, box in _quantisable(params):
            names.append(name := f"{network}/{layer}")
            rule = next((r for r in rules if _matches(r, name)), STAYS)
            unused.discard(rule)
            if (kind := rule[1]) == "none":
                kept.append(name)
            else:
                _check_kind(name, kind, path, box)
                layers.append((layer, kind))
        found[network] = tuple(layers)
    if unused:
        pattern, kind = min(unused)
        near = ", ".join(difflib.get_close_matches(pattern, names, 4, 0))
        raise UserError(f"{pattern}={kind} changes no layer; the nearest are {near}")
    if not any(found.values()):
        raise UserError(f"{method}: no layer is left that is quantised")
    return Choice(found, tuple(kept))


def _matches(rule: Rule, name: str) -> bool:
    try:
        return re.fullmatch(rule[0], name) is not None
    except re.error as error:
        raise UserError(f"{rule[0]!r}: {error}") from None


def _check_kind(name: str, kind: str, path: str, box: Any) -> None:
    if kind not in KINDS:
        raise UserError(f"{name}={kind}: give one of {', '.join(KINDS)}")
    if kind == "w8a8" and _sums(path, box) != (-2,):
        raise UserError(f"{name}={kind}: only a matrix product takes int8 rows; give w8")


def _quantisable(params: PyTree) -> Iterator[tuple[str, str, Any]]:
    """Yields the layers that can be quantised: path, path of the weight, and its box."""
    for path, box in traverse_util.flatten_dict(params, sep="/").items():
        layer, _, name = path.rpartition("/")
        if name in NAMES:
            yield layer, path, box


def _sums(path: str, box: Any) -> tuple[int, ...]:
    """Returns the axes of a weight along which all numbers have one scale."""
    axes = NAMES.get(path.rpartition("/")[-1])
    last = len(box.names) - (box.names[0] == "layers")
    return tuple(range(-last, -1)) if axes is None else axes


def with_quantised(params: PyTree, layers: Layers) -> PyTree:
    """Returns abstract parameters, boxed, with quantised weights where `layers` says so.

    Raises UserError for a layer that the network does not have.
    """
    if not layers:
        return params
    flat = traverse_util.flatten_dict(params, sep="/")
    paths = {layer: path for layer, path, _ in _quantisable(params)}
    for layer, kind in layers:
        if layer not in paths or kind not in (*KINDS[1:], STATIC):
            raise UserError(f"quantised: the network has no layer {layer} to be {kind}")
        path = paths[layer]
        box = flat[path]
        shape, names, axes = box.value.shape, box.names, _sums(path, box)
        flat[path] = Quantised(
            _box(box, shape, names, jnp.int8),
            _box(box, *_without(box, axes), jnp.float32),
            _box(box, shape[:-2], names[:-2], jnp.float32) if kind == STATIC else None,
            "float" if kind == "w8" else "int8",
        )
    return traverse_util.unflatten_dict(flat, sep="/")


def simulated(params: PyTree, layers: Sequence[str], products: Sequence[str]) -> PyTree:
    """Returns parameters whose `layers` are rounded to int8 in the `products`: see Simulated."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for name in layers:
        flat[f"{name}/kernel"] = Simulated(flat[f"{name}/kernel"], frozenset(products))
    return traverse_util.unflatten_dict(flat, sep="/") if layers else params


def sums_of(path: str, box: Quantised) -> tuple[int, ...]:
    """Returns the axes of a quantised weight along which all numbers have one scale."""
    return _sums(path, box.values)


def _without(box: nn.LogicallyPartitioned, axes: tuple[int, ...]):
    shape, names = list(box.value.shape), list(box.names)
    for axis in axes:
        shape[axis], names[axis] = 1, None
    return tuple(shape), tuple(names)


def _box(box, shape, names, dtype) -> nn.LogicallyPartitioned:
    return box.replace(value=jax.ShapeDtypeStruct(shape, dtype), names=names)
