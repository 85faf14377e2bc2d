"""Adapters: low-rank updates of a network's matrices (LoRA, Hu et al., arXiv 2106.09685).

A matrix W (in, out) becomes W + weight A B, with A (in, r) and B (r, out). The places where one can
stand are the network's dense layers; each is a `site` with the "/"-joined path of its layer. A
layer that holds several projections side by side has a site for each of them, named by its letter:
blocks/attention/qkv is the three sites blocks/attention/q, k and v.

An adapter is a tree of sites, {"a": (..., in, r), "b": (..., r, out)} each; layers of a stack lead.
Sites of the text encoder, beside those of the transformer, have names that begin with
text_encoder/: a branch of the tree, which `by_network` takes apart.
`attach` puts adapters into a network's parameters, as leaves beside the kernels that models/layers
reads: samplers, trainings and compiled programs need not know of them.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Array, Float

from sana_jax.kernels.int8 import is_quantised
from sana_jax.lora.config import LoraConfig
from sana_jax.models.layers import merged
from sana_jax.runtime.errors import UserError

PyTree = Any
TEXT_ENCODER = "text_encoder"
FUSED = "qkv", "kv"  # layers of several projections; the letters are their names


def sites(abstract_params: PyTree) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Returns the shape of the matrix at every site of a network, and the names of its axes.

    `abstract_params`: the network's parameters or shapes, boxed with their logical axes.
    """
    found = {}
    for path, kernel, axes in _kernels(abstract_params):
        if len(axes) - (axes[0] == "layers") != 2:
            continue  # a convolution
        parent, _, layer = path.rpartition("/")
        names = list(layer) if layer in FUSED else [layer]
        shape = *kernel.shape[:-1], kernel.shape[-1] // len(names)
        found |= {f"{parent}/{name}".removeprefix("/"): (shape, axes) for name in names}
    return found


def with_text_encoder(transformer: PyTree, text_encoder: PyTree) -> PyTree:
    """Returns one tree of what belongs to both networks: adapters, or parameters to be searched."""
    return {**transformer, TEXT_ENCODER: text_encoder}


def by_network(adapter: PyTree) -> dict[str, PyTree]:
    """Returns an adapter's parts, "dit" and "text_encoder", without those that are empty."""
    transformer = {name: branch for name, branch in adapter.items() if name != TEXT_ENCODER}
    parts = {"dit": transformer, TEXT_ENCODER: adapter.get(TEXT_ENCODER)}
    return {network: part for network, part in parts.items() if part}


def site_names(adapter: PyTree) -> list[str]:
    """Returns the sites that an adapter changes."""
    return [name for name, _ in _sites_of(adapter)]


def axes_of_halves(axes: tuple[str | None, ...]) -> dict[str, tuple[str | None, ...]]:
    """Returns the names of the axes of "a" and "b" beside a matrix with these; ranks stay whole."""
    return {"a": (*axes[:-1], None), "b": (*axes[:-2], None, axes[-1])}


def _kernels(abstract_params: PyTree) -> Iterator[tuple[str, Any, tuple[str | None, ...]]]:
    flat = traverse_util.flatten_dict(abstract_params, sep="/")
    for path, box in flat.items():
        if path.endswith("/kernel"):
            box = box.values if is_quantised(box) else box
            yield path.removesuffix("/kernel"), box.unbox(), box.names


def chosen(abstract_params: PyTree, patterns: Sequence[str]) -> list[str]:
    """Returns the sites whose whole name a pattern matches, in order.

    Raises UserError for a pattern that matches none, or is no regular expression.
    """
    known, found = sites(abstract_params), set()
    for pattern in patterns:
        try:
            matching = [name for name in known if re.fullmatch(pattern, name)]
        except re.error as error:
            raise UserError(f"targets: {pattern!r}: {error}") from None
        if not matching:
            shown = ", ".join(sorted(known, key=lambda name: not name.startswith("blocks"))[:12])
            raise UserError(f"targets: {pattern!r} matches nothing; there are {shown}, ...")
        found.update(matching)
    return sorted(found)


def new_adapter(abstract_params: PyTree, config: LoraConfig, key: Array) -> PyTree:
    """Returns the adapter from which a training starts, boxed with its logical axes.

    A is normal with a deviation of 1 / rank, as diffusers' script has it, and B zero, so that the
    network starts as it was. Raises UserError for targets that match nothing.
    """
    known, made = sites(abstract_params), {}
    names = chosen(abstract_params, config.targets)
    for name, of_site in zip(names, jax.random.split(key, len(names)), strict=True):
        (*layers, inputs, outputs), axes = known[name]
        if config.rank > min(inputs, outputs):
            raise UserError(
                f"rank={config.rank}: the matrix of {name}, {inputs} x {outputs}, is of rank"
                f" {min(inputs, outputs)} at most: give no more"
            )
        a = jax.random.normal(of_site, (*layers, inputs, config.rank)) / config.rank
        b = jnp.zeros((*layers, config.rank, outputs))
        names_of = axes_of_halves(axes)
        for half, array in ("a", a), ("b", b):
            made[f"{name}/{half}"] = nn.LogicallyPartitioned(array, names_of[half])
    return traverse_util.unflatten_dict(made, sep="/")


def attach(
    params: PyTree, adapters: Iterable[tuple[PyTree, float | Array]], dropout: float = 0.0
) -> PyTree:
    """Returns a network's parameters with adapters beside the kernels that they change.

    Args:
      params: the network's parameters; their arrays are shared, not copied.
      adapters: adapters with their weights. A site may have a "scale" too, a factor for all layers
        or one for each, (layers,).
      dropout: the probability with which an input of the updates is zeroed, wherever the network
        is given a key "dropout"; not for Mix-FFN's matrices.

    Raises:
      UserError: an adapter has a site or a shape that the network does not have.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    parts: dict[str, list[tuple[Array, Array]]] = {}
    for adapter, weight in adapters:
        for name, site in _sites_of(adapter):
            layer, number, count = _layer(flat, name)
            a, b = jnp.asarray(site["a"]), jnp.asarray(site["b"], jnp.float32) * weight
            if "scale" in site:
                b = b * jnp.asarray(site["scale"])[..., None, None]
            _check(name, flat[f"{layer}/kernel"].shape, count, a, b)
            # Beside its own projection an update adds nothing.
            before, after = (b.shape[-1] * n for n in (number, count - 1 - number))
            wide = jnp.pad(b, [(0, 0)] * (b.ndim - 1) + [(before, after)])
            parts.setdefault(layer, []).append((a, wide))
    for layer, pairs in parts.items():
        some, others = zip(*pairs, strict=True)
        flat[f"{layer}/lora/a"] = jnp.concatenate(some, axis=-1)
        flat[f"{layer}/lora/b"] = jnp.concatenate(others, axis=-2)
        if dropout:
            layers = some[0].shape[:-2]
            flat[f"{layer}/lora/keep"] = jnp.full(layers, 1 - dropout, jnp.float32)
    return traverse_util.unflatten_dict(flat, sep="/")


def merge(
    params: PyTree,
    update: Callable[[str, Any, Mapping[str, Any]], Any] = lambda _, *pair: merged(*pair),
    path: str = "",
) -> PyTree:
    """Returns parameters whose kernels have the updates that `attach` put beside them.

    `update` makes such a kernel from its name, itself and its "lora"; by default with float32 sums,
    rounded to the dtype of the kernel.
    """
    if not isinstance(params, Mapping):
        return params
    branches = {name: (x, f"{path}/{name}".lstrip("/")) for name, x in params.items()}
    kept = {name: merge(x, update, at) for name, (x, at) in branches.items() if name != "lora"}
    if "lora" in params:
        kept["kernel"] = update(f"{path}/kernel", kept["kernel"], params["lora"])
    return kept


def detach(params: PyTree) -> PyTree:
    """Returns parameters without what `attach` put beside their kernels; arrays are shared."""
    return merge(params, lambda _, kernel, lora: kernel)


def _sites_of(
    adapter: PyTree, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if "a" in adapter and "b" in adapter:
        yield "/".join(path), adapter
        return
    for name, branch in adapter.items():
        yield from _sites_of(branch, (*path, name))


def _layer(flat: Mapping[str, Any], name: str) -> tuple[str, int, int]:
    """Returns the layer of a site, which of its projections the site is, and of how many."""
    if f"{name}/kernel" in flat:
        return name, 0, 1
    parent, _, letter = name.rpartition("/")
    for fused in FUSED:
        layer = f"{parent}/{fused}".removeprefix("/")
        if len(letter) == 1 and letter in fused and f"{layer}/kernel" in flat:
            return layer, fused.index(letter), len(fused)
    raise UserError(f"a LoRA of {name}: the network has no such matrix")


def _check(
    name: str, kernel: tuple[int, ...], count: int, a: Float[Array, "..."], b: Float[Array, "..."]
) -> None:
    *layers, inputs, outputs = kernel
    rank = a.shape[-1] if a.ndim else 0
    wanted = (*layers, inputs, rank), (*layers, rank, outputs // count)
    if (a.shape, b.shape) != wanted or not math.prod(a.shape):
        shapes = " and ".join(str(list(x.shape)) for x in (a, b))
        raise UserError(
            f"a LoRA of {name} has {shapes}, its matrix is {[*layers, inputs, outputs // count]}:"
            " it is of another network"
        )
