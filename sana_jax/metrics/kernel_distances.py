"""Distances of two sets of features by kernels: KID and CMMD. Both estimate a squared MMD.

KID (arXiv 1801.01401, section 4): the kernel (x y / d + 1)^3 of Inception's features, unbiased, as
the mean over subsets. Their draw and its seed are torch-fidelity's.

CMMD (arXiv 2401.09603, section 4): the kernel exp(-|x - y|^2 / (2 sigma^2)) of CLIP's features of
length one, sigma 10, biased (the least variance), times 1000.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

SUBSETS, SUBSET, SEED = 100, 1000, 2020  # of KID
SIGMA, SCALE = 10.0, 1000.0  # of CMMD
BLOCK = 2048  # rows of a kernel's matrix at once

Rows = Float[np.ndarray, "N D"]
Others = Float[np.ndarray, "M D"]


def kid(x: Rows, y: Others) -> tuple[float, float]:
    """Returns the mean and the spread over subsets, of as many features as x and y both have.

    A subset has SUBSET features of each, or fewer if there are fewer. Values slightly below zero
    are valid. Raises ValueError for less than two features.
    """
    size = min(SUBSET, len(x), len(y))
    if size < 2:
        raise ValueError(f"KID of {len(x)} and {len(y)} features")
    draw = np.random.RandomState(SEED)
    # Of sets that are no larger than a subset, all subsets are the same.
    count = SUBSETS if max(len(x), len(y)) > size else 1
    found = []
    for _ in range(count):
        chosen = (rows[draw.choice(len(rows), size, replace=False)] for rows in (x, y))
        a, b = (rows.astype(np.float64) for rows in chosen)  # differences of sums are what counts
        within = sum(k.sum() - np.trace(k) for k in (_cubic(a, a), _cubic(b, b)))
        found.append(within / (size * (size - 1)) - 2 * _cubic(a, b).mean())
    return float(np.mean(found)), float(np.std(found))


def _cubic(x: Rows, y: Others) -> Float[np.ndarray, "N M"]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def cmmd(x: Rows, y: Others) -> float:
    """Returns CMMD of features of length one."""

    def gaussian(a: Rows, b: Others) -> Float[np.ndarray, "N M"]:
        squares = [np.square(rows, dtype=np.float64).sum(axis=1) for rows in (a, b)]
        distances = squares[0][:, None] + squares[1] - 2 * (a @ b.T).astype(np.float64)
        return np.exp(-distances / (2 * SIGMA**2))

    within = _mean(gaussian, x, x) + _mean(gaussian, y, y)
    return SCALE * (within - 2 * _mean(gaussian, x, y))


def _mean(kernel: Callable[[Rows, Others], np.ndarray], x: Rows, y: Others) -> float:
    """Returns the mean of a kernel over all pairs, of which some are in memory at a time."""
    starts = [(i, j) for i in range(0, len(x), BLOCK) for j in range(0, len(y), BLOCK)]
    total = sum(kernel(x[i : i + BLOCK], y[j : j + BLOCK]).sum() for i, j in starts)
    return float(total / (len(x) * len(y)))
