"""What numbers and choices may be. Everything here raises UserError, naming the argument."""

import numbers
from collections.abc import Sequence

from sana_jax.errors import UserError

MAX_SEED = 2**32 - 1  # jax.random.key keeps 32 bits
MAX_STEPS = 1000


class BadArgument(UserError):
    """`name`: the argument's, for a caller whose user knows where it was given."""

    def __init__(self, name: str, wrong: str):
        self.name = name
        super().__init__(f"{name} {wrong}")


def whole(name: str, value, low: int, high: int) -> int:
    """A whole number in low .. high; numpy's are numbers too, truth values are not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise BadArgument(name, f"{value!r} is not a whole number in {low} .. {high}")
    if not low <= value <= high:
        raise BadArgument(name, f"{value} is not a whole number in {low} .. {high}")
    return int(value)


def number(name: str, value, low: float, high: float) -> float:
    """A finite number in low .. high."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not low <= value <= high:
        raise BadArgument(name, f"{value!r} is not a number in {low:g} .. {high:g}")
    return float(value)


def multiple(given: str, side: int, step: int) -> None:
    """Raises unless `side`, in pixels, is a multiple of `step`; `given`: how the caller put it."""
    if side % step:
        raise UserError(f"{given} is not a multiple of {step}: try {near(side, step)}")


def near(side: int, step: int) -> str:
    """The multiples of `step` on both sides of `side`, in words."""
    low = side // step * step
    return f"{low} or {low + step}" if low else str(step)


def choice(name: str, value, choices: Sequence[str]) -> str:
    if value not in list(choices):
        raise UserError(f"{name} {value!r} is not one of {', '.join(choices)}")
    return value
