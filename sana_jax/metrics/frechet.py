"""The Fréchet distance of two sets of features, and the mean and covariance that it compares.

FID (arXiv 1706.08500, equation 6): the distance of two normal distributions,

    |m - n|^2 + tr(S + T - 2 (S T)^(1/2))

Statistics are stored as .npz files with `mu` and `sigma`, as pytorch-fid and clean-fid do.
"""

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from sana_jax.runtime.errors import UserError, refused
from sana_jax.runtime.files import check_is_file, check_itself, unwritten, write_atomically

Rows = Float[np.ndarray, "N D"]


class Statistics(NamedTuple):
    """The mean and the unbiased covariance of features."""

    mean: Float[np.ndarray, " D"]
    covariance: Float[np.ndarray, "D D"]
    root: Float[np.ndarray, "R D"] | None = None  # root' root = covariance, where it is known


def statistics(blocks: Callable[[], Iterable[Rows]]) -> Statistics:
    """Returns the statistics of features in float64, of which one block at a time is in memory.

    `blocks()` yields all features, and is called twice. Raises UserError for less than two rows.
    """
    total, count = np.zeros(()), 0
    for rows in blocks():
        total = total + rows.sum(axis=0, dtype=np.float64)
        count += len(rows)
    if count < 2:
        raise UserError(f"a covariance needs two pictures or more, and there are {count}")
    mean = total / count
    if count <= mean.size:
        root = (np.concatenate(list(blocks())) - mean) / (count - 1) ** 0.5
        return Statistics(mean, root.T @ root, root)
    products = np.zeros((mean.size, mean.size))
    for rows in blocks():
        centred = rows - mean
        products += centred.T @ centred
    return Statistics(mean, products / (count - 1))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Returns the distance, zero for equal statistics up to rounding.

    Where S = A' A and T = B' B, the trace of (S T)^(1/2) is the sum of the singular values of A B'.
    So it exists for singular covariances too, those of fewer pictures than features.
    """
    difference = a.mean - b.mean
    trace = np.linalg.norm(_root(a) @ _root(b).T, "nuc")
    spread = np.trace(a.covariance) + np.trace(b.covariance)
    return float(difference @ difference + spread - 2 * trace)


def _root(found: Statistics) -> Float[np.ndarray, "R D"]:
    if found.root is not None:
        return found.root
    values, vectors = np.linalg.eigh(found.covariance)
    return np.sqrt(values.clip(min=0))[:, None] * vectors.T


def read_statistics(path: str | Path, width: int) -> Statistics:
    """Reads a .npz file with `mu` and `sigma` of `width` features. Raises UserError."""
    path = Path(path).expanduser()
    check_is_file(path, str(path))
    if not path.exists():
        raise UserError(f"{path} is missing")
    check_itself(path)
    with refused(f"{path} is no .npz file of statistics"), np.load(path) as file:
        found = {name: file[name] for name in ("mu", "sigma") if name in file}
    if set(found) != {"mu", "sigma"}:
        raise UserError(f"{path} lacks mu or sigma, the mean and the covariance of features")
    shapes = {"mu": (width,), "sigma": (width, width)}
    for name, array in found.items():
        if array.shape != shapes[name] or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise UserError(
                f"{path}: {name} is {array.dtype} {list(array.shape)}, where finite numbers"
                f" {list(shapes[name])} are needed"
            )
    return Statistics(*(found[name].astype(np.float64) for name in ("mu", "sigma")))


def write_statistics(path: str | Path, found: Statistics) -> None:
    """Writes a .npz file that pytorch-fid reads too. Raises UserError, or Retry for a full disk."""
    content = io.BytesIO()
    np.savez_compressed(content, mu=found.mean, sigma=found.covariance)
    try:
        write_atomically(epath.Path(path), content.getvalue())
    except OSError as error:
        raise unwritten(str(path), error) from None
