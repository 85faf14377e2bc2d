"""What SanaPipeline's arguments may be. Everything here raises UserError, naming the argument."""

import numbers
from collections.abc import Sequence

import numpy as np

from sana_jax.errors import UserError

MAX_SEED = 2**32 - 1  # jax.random.key keeps 32 bits
MAX_STEPS = 1000


def whole(name: str, value, low: int, high: int) -> int:
    """A whole number in low .. high; numpy's are numbers too, truth values are not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise UserError(f"{name} {value!r} is not a whole number in {low} .. {high}")
    if not low <= value <= high:
        raise UserError(f"{name} {value} is not a whole number in {low} .. {high}")
    return int(value)


def number(name: str, value, low: float, high: float) -> float:
    """A finite number in low .. high."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not low <= value <= high:
        raise UserError(f"{name} {value!r} is not a number in {low:g} .. {high:g}")
    return float(value)


def multiple(given: str, side: int, step: int) -> None:
    """Raises unless `side`, in pixels, is a multiple of `step`; `given`: how the caller put it."""
    if side % step:
        low = side // step * step
        near = f"{low} or {low + step}" if low else str(step)
        raise UserError(f"{given} is not a multiple of {step}: try {near}")


def choice(name: str, value, choices: Sequence[str]) -> str:
    if value not in list(choices):
        raise UserError(f"{name} {value!r} is not one of {', '.join(choices)}")
    return value


def texts(name: str, value) -> list[str]:
    """One text, or a list of some."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise UserError(f"{name} {value!r} is neither a text nor a list of texts")
    if not values:
        raise UserError(f"{name} is an empty list")
    return list(values)


def per_prompt(name: str, value, count: int) -> np.ndarray:
    """A finite number, or one a prompt, as float32 (count,)."""
    one = isinstance(value, numbers.Real)
    values = [value] * count if one else value
    if not isinstance(values, Sequence | np.ndarray) or len(values) != count:
        raise UserError(f"{name} {value!r} is neither a number nor {count} of them, one a prompt")
    return np.asarray([number(name, v, -1e6, 1e6) for v in values], np.float32)


def interval(name: str, value) -> tuple[np.float32, np.float32] | None:
    """(low, high) with low < high, or None."""
    if value is None:
        return None
    if not isinstance(value, Sequence) or len(value) != 2:
        raise UserError(f"{name} {value!r} is not a pair (low, high) of noise levels")
    low, high = (number(name, v, -1e6, 1e6) for v in value)
    if not low < high:
        raise UserError(f"{name} {value!r}: low must be below high")
    return np.float32(low), np.float32(high)


def seeds(value, count: int) -> np.ndarray:
    """One seed an image, or the first image's, which the others count up from; uint32 (count,)."""
    if isinstance(value, numbers.Integral) or np.ndim(value) == 0:
        first = whole("seed", value, 0, MAX_SEED)
        return np.asarray([(first + i) % (MAX_SEED + 1) for i in range(count)], np.uint32)
    values = [whole("seed", seed, 0, MAX_SEED) for seed in value]
    if len(values) != count:
        raise UserError(f"{len(values)} seeds for {count} images")
    return np.asarray(values, np.uint32)


def array(name: str, value, shape: tuple[int | str, ...], kind=np.floating):
    """An array whose axes have the sizes in `shape`; a word there stands for any size, one twice
    for the same."""
    axes = ", ".join(map(str, shape))
    found = getattr(value, "shape", None)
    sizes = {}
    fits = found is not None and len(found) == len(shape)
    fits = fits and all(
        size == sizes.setdefault(axis, axis if isinstance(axis, int) else size)
        for size, axis in zip(found, shape, strict=True)
    )
    if not fits:
        raise UserError(f"{name} is {_describe(value)} instead of an array ({axes})")
    if 0 in found:
        raise UserError(f"{name} is empty: its shape is {_describe(value)}")
    bfloat16 = kind is np.floating and str(value.dtype) == "bfloat16"
    try:
        known = bfloat16 or np.issubdtype(value.dtype, kind)
    except TypeError:  # torch's
        known = False
    if not known:
        raise UserError(f"{name} holds {value.dtype} instead of {kind.__name__}")
    return value


def _describe(value) -> str:
    return str(getattr(value, "shape", type(value).__name__))
