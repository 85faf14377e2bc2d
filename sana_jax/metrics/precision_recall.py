"""Improved precision and recall (arXiv 1904.06991, section 3): how far two sets cover each other.

A set is the union of balls around its features, each out to the third nearest of the others.
Precision is the share of generated features inside the real set, recall that of real features
inside the generated set.
"""

import numpy as np
from jaxtyping import Bool, Float

NEIGHBOURS = 3
BLOCK = 512  # rows of the distances in memory

Rows = Float[np.ndarray, "N D"]
Others = Float[np.ndarray, "M D"]


def precision_recall(generated: Rows, real: Others) -> tuple[float, float]:
    """Returns precision and recall. Raises ValueError for three features or less in a set."""
    if min(len(generated), len(real)) <= NEIGHBOURS:
        raise ValueError(f"precision of {len(generated)} and {len(real)} features")
    covered = _inside(generated, real), _inside(real, generated)
    precision, recall = (float(inside.mean()) for inside in covered)
    return precision, recall


def _inside(x: Rows, y: Others) -> Bool[np.ndarray, " N"]:
    """Returns which of x lie in a ball of y."""
    radii = np.concatenate([_radii(y, start) for start in range(0, len(y), BLOCK)])
    blocks = (x[start : start + BLOCK] for start in range(0, len(x), BLOCK))
    return np.concatenate([(_squares(block, y) <= radii).any(axis=1) for block in blocks])


def _radii(y: Others, start: int) -> Float[np.ndarray, " B"]:
    """Returns the squared radii of a block's balls."""
    block = y[start : start + BLOCK]
    squares = _squares(block, y)
    rows = np.arange(len(block))
    squares[rows, start + rows] = 0  # a feature itself, up to rounding
    squares.partition(NEIGHBOURS, axis=1)
    return squares[:, NEIGHBOURS].copy()


def _squares(x: Rows, y: Others) -> Float[np.ndarray, "N M"]:
    """Returns squared distances, for which the features of y are centred a block at a time."""
    found = np.empty((len(x), len(y)), np.float32)
    for start in range(0, len(y), BLOCK):
        other = y[start : start + BLOCK]
        centre = other[:1]  # from far away, distances would lose their digits
        a, b = x - centre, other - centre
        norms = (np.square(rows).sum(axis=1) for rows in (a, b))
        found[:, start : start + BLOCK] = np.add.outer(*norms) - 2 * (a @ b.T)
    return found
