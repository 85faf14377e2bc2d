"""Translates between our parameters and another project's tensors, by one table for both ways.

An `Entry` says which of their tensors make one of our parameters, and how axes move, as an einops
pattern "theirs -> ours". The reversed pattern writes their tensors from our parameter.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from einops import rearrange
from flax import traverse_util

from sana_jax.checkpoints.tensors import FLOAT_DTYPES, INT8, LazyArray, Tensors, on_host
from sana_jax.runtime.errors import UserError

LINEAR = "o i -> i o"
POINTWISE = "o i 1 1 -> i o"
CONV = "o i h w -> h w i o"
DEPTHWISE = "c 1 h w -> h w c"
SAME = "... -> ..."

MOST_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our parameters and the tensors that make it.

    path: our parameter, "/"-joined. names: their tensors; several are joined along their axis 0.
    layers: the values of "{i}" in the names, one for each layer of a stacked parameter; None if it
    is not stacked. sizes: axis lengths that the pattern alone does not give.
    """

    path: str
    names: tuple[str, ...]
    pattern: str = SAME
    layers: range | None = None
    sizes: tuple[tuple[str, int], ...] = ()

    def layer_names(self) -> list[tuple[str, ...]]:
        """Returns the other format's names for each layer; an unstacked parameter has one layer."""
        layers = [None] if self.layers is None else self.layers
        return [tuple(name.replace("{i}", str(i)) for name in self.names) for i in layers]

    def read(self, theirs: Mapping[str, np.ndarray], dtype=None) -> np.ndarray:
        """Assembles our parameter from the other format's tensors, cast to `dtype`.

        Besides the result, only one layer is in memory. Raises UserError, naming the tensor, if a
        value is NaN or infinite, in the file or after the cast.
        """
        stacked = None
        for i, names in enumerate(self.layer_names()):
            parts = [cast(name, theirs[name], dtype) for name in names]
            joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
            layer = rearrange(joined, self.pattern, **dict(self.sizes))
            if self.layers is None:
                return layer
            if stacked is None:
                stacked = np.empty((len(self.layers), *layer.shape), layer.dtype)
            stacked[i] = layer
        return stacked

    def write(self, ours: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yields their tensors, by name, from our parameter."""
        left, right = self.pattern.split("->")
        for layer, names in enumerate(self.layer_names()):
            array = ours if self.layers is None else ours[layer]
            array = rearrange(array, f"{right} -> {left}", **dict(self.sizes))
            yield from zip(names, np.split(array, len(names)), strict=True)

    def their_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of their tensors, by name, from the shape of our parameter."""
        # A broadcast view of a single zero has the shape and costs no memory.
        ours = np.broadcast_to(np.zeros((), np.int8), shape)
        return {name: array.shape for name, array in self.write(ours)}


def linear(path: str, *names: str, bias: bool = True, **kwargs) -> Iterator[Entry]:
    """Yields the entries of a dense layer: kernel and bias."""
    yield Entry(f"{path}/kernel", tuple(f"{n}.weight" for n in names), LINEAR, **kwargs)
    if bias:
        yield Entry(f"{path}/bias", tuple(f"{n}.bias" for n in names), **kwargs)


def conv(path: str, name: str, bias: bool = True, **kwargs) -> Iterator[Entry]:
    """Yields the entries of a convolution: kernel and bias."""
    yield Entry(f"{path}/kernel", (f"{name}.weight",), CONV, **kwargs)
    if bias:
        yield Entry(f"{path}/bias", (f"{name}.bias",), **kwargs)


def flat_leaves(params) -> dict[str, Any]:
    """Returns the arrays of nested parameters, or their shapes, by "/"-joined path.

    A quantised weight is several: kernel/values, kernel/scale.
    """
    return {
        "/".join((path, *(key.name for key in inner))): leaf
        for path, tree in traverse_util.flatten_dict(params, sep="/").items()
        for inner, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _some(items: list[str]) -> str:
    more = f", ... ({len(items)} in all)" if len(items) > MOST_SHOWN else ""
    return ", ".join(items[:MOST_SHOWN]) + more


def check(
    component: str,
    entries: Iterable[Entry],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    theirs: Tensors,
    ignored: tuple[str, ...] = (),
) -> None:
    """Checks that `theirs` holds exactly the tensors that our parameters need. Raises UserError.

    Names that end in one of `ignored` may be present and are not read.
    """
    entries = list(entries)
    paths = [entry.path for entry in entries]
    assert sorted(paths) == sorted(shapes), set(paths) ^ set(shapes)
    expected, integers = {}, set()
    for entry in entries:
        leaf = shapes[entry.path]
        expected |= (theirs_of := entry.their_shapes(leaf.shape))
        integers |= theirs_of.keys() if leaf.dtype == np.int8 else set()
    found = {name for name in theirs if not name.endswith(ignored)} if ignored else set(theirs)
    problems = []
    if missing := sorted(set(expected) - found):
        problems.append(f"missing {_some(missing)}")
    if extra := sorted(found - set(expected)):
        problems.append(f"unexpected {_some(extra)}")
    wrong = [
        f"{name} is {list(theirs.shape(name))} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and theirs.shape(name) != shape
    ]
    if wrong:
        problems.append(f"shapes: {_some(wrong)}")
    types = [
        f"{name} is {theirs.dtype(name)}"
        for name in expected
        if name in found and theirs.dtype(name) not in (INT8 if name in integers else FLOAT_DTYPES)
    ]
    if types:
        needed = "floating point is needed" + ", int8 for values" * bool(integers)
        problems.append(f"types: {_some(types)} ({needed})")
    if problems:
        raise UserError(f"{component} does not fit its architecture: {'; '.join(problems)}")


def lazy_params(entries: Iterable[Entry], shapes, theirs: Tensors):
    """Returns our nested parameters as LazyArrays of the tensors' own dtypes."""
    params = {}
    for entry in entries:
        types = {theirs.dtype(name) for names in entry.layer_names() for name in names}
        dtype = (FLOAT_DTYPES | INT8)[types.pop()] if len(types) == 1 else "float32"
        load = functools.partial(entry.read, theirs)
        params[entry.path] = LazyArray(shapes[entry.path].shape, np.dtype(dtype), load)
    return traverse_util.unflatten_dict(params, sep="/")


def write_params(entries: Iterable[Entry], params) -> Iterator[tuple[str, LazyArray]]:
    """Yields their tensors, lazily, from our nested parameters, which may be lazy themselves."""
    flat = traverse_util.flatten_dict(params, sep="/")

    held = {}  # the stack whose layers are being written; dropped before the next one is read

    def tensors(entry: Entry) -> dict[str, np.ndarray]:
        if entry.path not in held:
            held.clear()
            held[entry.path] = dict(entry.write(on_host(flat[entry.path])))
        return held[entry.path]

    for entry in entries:
        ours = flat[entry.path]
        for name, shape in entry.their_shapes(ours.shape).items():
            yield name, LazyArray(shape, ours.dtype, lambda _, e=entry, n=name: tensors(e)[n])


def cast(name: str, array: np.ndarray, dtype) -> np.ndarray:
    """Returns `array` in another dtype. Raises UserError if a number is not finite."""
    with np.errstate(over="ignore"):  # the error below names it
        made = array.astype(dtype or array.dtype, copy=False)
    if not _is_finite(made):
        what = f"overflows {dtype}" if _is_finite(array) else "holds NaN or Inf"
        raise UserError(f"{name} {what}")
    return made


def _is_finite(array: np.ndarray) -> bool:
    """Returns True if all numbers are finite.

    Works in parts, because the truth values of a large array are large too.
    """
    return all(np.isfinite(part).all() for part in np.array_split(array.reshape(-1), 64))
