"""What jaxtyping's import hook checks in the tests: the annotations of arrays.

Those of other arguments are promises to callers, and what breaks them is refused by UserErrors
that have tests of their own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray

ROOT = Path(__file__).parents[1]
# Those that write such annotations: a checked function is slower to call, with or without them.
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "sana_jax").rglob("*.py"))
    if "from jaxtyping import" in path.read_text()
]

# Its methods refuse bad arrays themselves; what they return is checked.
FACE = "SanaPipeline."


def check_arrays(function: Callable) -> Callable:
    """beartype, of the parameters and the result that hold arrays with a shape."""
    hints = {name: hint for name, hint in function.__annotations__.items() if _has_shape(hint)}
    if function.__qualname__.startswith(FACE):
        hints = {name: hint for name, hint in hints.items() if name == "return"}
    function.__annotations__ = hints
    return beartype(function) if hints else function


def _has_shape(hint: Any) -> bool:
    is_array = isinstance(hint, type) and issubclass(hint, AbstractArray)
    return is_array or any(map(_has_shape, get_args(hint)))
