"""Checks for jaxtyping's import hook: the annotations of arrays with a shape, in every test.

Annotations of other arguments are promises to callers; UserErrors refuse what breaks them, and have
tests of their own. Where `Array` is written, NumPy's is taken too, as JAX does: a function that is
called outside jit hands such an array through. Shapes and dtypes must be those of the annotation.
"""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import jax
import numpy as np
from beartype import beartype
from jaxtyping import AbstractArray

ROOT = Path(__file__).parents[1]
# Modules with such annotations: a checked function is slower to call, with or without them.
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "sana_jax").rglob("*.py"))
    if "from jaxtyping import" in path.read_text()
]

# Their methods refuse bad arrays themselves, in words for users; their results are checked.
FACES = "SanaPipeline.", "Request."


def check_arrays(function: Callable) -> Callable:
    """Applies beartype to the parameters and the result that are arrays with a shape."""
    if function.__name__ == "__init__":  # of a tree, which JAX also makes of shapes and shardings
        return function
    hints = {name: hint for name, hint in function.__annotations__.items() if _has_shape(hint)}
    if function.__qualname__.startswith(FACES):
        hints = {name: hint for name, hint in hints.items() if name == "return"}
    function.__annotations__ = {name: _or_numpy(hint) for name, hint in hints.items()}
    return beartype(function) if function.__annotations__ else function


def _is_shaped(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def _has_shape(hint: Any) -> bool:
    return _is_shaped(hint) or any(map(_has_shape, get_args(hint)))


def _or_numpy(hint: Any) -> Any:
    if _is_shaped(hint) and hint.array_type is jax.Array:
        return hint.dtype[jax.Array | np.ndarray, hint.dim_str]
    origin = Union if isinstance(hint, types.UnionType) else get_origin(hint)
    return origin[tuple(map(_or_numpy, get_args(hint)))] if origin in (Union, tuple) else hint
