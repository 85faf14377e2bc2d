"""Masks of the parameters that are trained and that are decayed, by their "/"-joined paths."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from flax import linen as nn

from sana_jax.runtime.errors import UserError

PyTree = Any

EVERYTHING = (".*",)


def decay_mask(params: PyTree) -> PyTree:
    """Returns True for matrices and filters; norms, biases, tables and embeddings do not decay.

    The two matrices of a low-rank update are called a and b.
    """
    return map_with_name(lambda name, _: name.endswith(("kernel", "/a", "/b")), params)


def trainable_mask(params: PyTree, patterns: Sequence[str]) -> PyTree:
    """Returns True where a pattern matches the whole path.

    Raises UserError for a pattern that matches no path, or is no regular expression.
    """
    unmatched = set(patterns)

    def trains(name, _):
        matching = {pattern for pattern in patterns if _matches(pattern, name)}
        unmatched.difference_update(matching)
        return bool(matching)

    mask = map_with_name(trains, params)
    if unmatched:
        names = []
        map_with_name(lambda name, _: names.append(name), params)
        raise UserError(
            f"trainable pattern {min(unmatched)!r} matches no parameter; paths are as {names[0]!r}"
        )
    return mask


def stop_frozen(params: PyTree, mask: PyTree) -> PyTree:
    """Cuts the gradients of the parameters that the mask freezes, so none are computed."""
    return jax.tree.map(lambda p, train: p if train else jax.lax.stop_gradient(p), params, mask)


def map_with_name(function: Callable[[str, Any], Any], params: PyTree) -> PyTree:
    """Maps `function` over the "/"-joined paths and parameters; a boxed parameter is one leaf."""

    def is_leaf(x):
        return isinstance(x, nn.meta.AxisMetadata | optax.MaskedNode)

    def call(path, leaf):
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        return function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)

    return jax.tree_util.tree_map_with_path(call, params, is_leaf=is_leaf)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UserError(f"trainable pattern {pattern!r}: {error}") from None
