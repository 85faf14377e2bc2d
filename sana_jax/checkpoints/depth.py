"""Gives a transformer more blocks, or fewer (SANA-1.5, arXiv 2501.18427).

A grown network starts as the smaller one: the branches of a new block end in zeros, so that it
returns its input. A pruned network keeps the blocks that matter most (importance.py), in order.
Weights stay unread: a LazyArray becomes one of another number of layers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from sana_jax.checkpoints.components import Checkpoint
from sana_jax.checkpoints.tensors import LazyArray
from sana_jax.models.config import MAX_LAYERS
from sana_jax.runtime.errors import UserError

About = Callable[[], dict[str, Any]]  # what the provenance tells besides, once all is checked

DROPPED = 2  # of the paper's 20 blocks: the last two, which turn features into a velocity

# The weights of a new block, by their path below blocks/: zeros where a branch ends, so that it
# adds nothing; ones in a norm; all others normal with one of these deviations.
ZEROS = (
    "attention/out/kernel",
    "attention/out/bias",
    "cross_attention/out/kernel",
    "cross_attention/out/bias",
    "ffn/contract/kernel",
    "ffn/contract/bias",  # of an MLP (models/variants.py)
)
DEVIATION, DEPTHWISE_DEVIATION = 0.02, 0.2


def grow(
    checkpoint: Checkpoint, depth: int, keep: int | None = None, seed: int = 0, about: About = dict
) -> Checkpoint:
    """Returns the checkpoint with a transformer of `depth` blocks, more than it has; unread.

    Args:
      keep: the first blocks, which stay; the new ones follow them. None: all but the last two, as
        in the paper. All of them: the grown network starts as the whole smaller one.
      seed: of the new blocks' weights.
      about: returns what the provenance tells besides.

    Raises UserError.
    """
    now = _depth_of(checkpoint, "--grow")
    if checkpoint.dit.quantised:
        raise UserError("--grow: the transformer is quantised: grow what it was made from")
    if not now < depth <= MAX_LAYERS:
        fewer = ", or fewer by --prune" if depth < now else ""
        raise UserError(
            f"--grow={depth}: --source has {now} blocks; give {now + 1} to {MAX_LAYERS}{fewer}"
        )
    if keep is None and now <= DROPPED:
        raise UserError(
            f"--grow drops the last {DROPPED} blocks, and --source has {now}: say how many stay by"
            f" --keep"
        )
    kept = now - DROPPED if keep is None else keep
    if not 1 <= kept <= now:
        raise UserError(f"--keep={kept}: --source has {now} blocks; give 1 to {now}")

    def grown(path, stack) -> LazyArray:
        name, shape = jax.tree_util.keystr(path, simple=True, separator="/"), stack.shape[1:]

        def load(dtype: np.dtype) -> np.ndarray:
            array = np.empty((depth, *shape), dtype)
            array[:kept] = np.asarray(stack, dtype)[:kept]
            for layer in range(kept, depth):
                array[layer] = new_weight(name, shape, seed, layer)
            return array

        return LazyArray((depth, *shape), np.dtype(stack.dtype), load)

    told = {"grown": depth, "from": now, "kept": kept, "seed": seed, **about()}
    return _replaced(checkpoint, depth, grown, told)


def prune(
    checkpoint: Checkpoint,
    depth: int,
    importance: Callable[[int], Sequence[float]],
    about: About = dict,
) -> Checkpoint:
    """Returns the checkpoint with its `depth` most important blocks, fewer than it has; unread.

    `importance` returns a number for every block, given how many there are. Raises UserError.
    """
    now = _depth_of(checkpoint, "--prune")
    if not 1 <= depth < now:
        more = ", or more by --grow" if depth > now else ""
        fewer = f"give 1 to {now - 1}{more}" if now > 1 else "it cannot be pruned"
        raise UserError(f"--prune={depth}: --source has {now} blocks; {fewer}")
    numbers = list(importance(now))
    kept = most_important(numbers, depth)

    def pruned(path, stack) -> LazyArray:
        shape = (depth, *stack.shape[1:])
        return LazyArray(shape, np.dtype(stack.dtype), lambda dtype: np.asarray(stack, dtype)[kept])

    told = {"pruned": depth, "from": now, "kept": kept, "importance": numbers, **about()}
    return _replaced(checkpoint, depth, pruned, told)


def most_important(importance: Sequence[float], count: int) -> list[int]:
    """Returns the numbers of the `count` most important blocks, rising; of equals the first."""
    order = sorted(range(len(importance)), key=lambda i: -importance[i])
    return sorted(order[:count])


def new_weight(name: str, shape: tuple[int, ...], seed: int, layer: int) -> np.ndarray:
    """Returns the weights of a new block, in float32; they depend on the arguments alone.

    The paper does not name the modulation table, nor the biases of the other layers: they are
    normal too, as in the published code. `name` is the path below blocks/.
    """
    if name in ZEROS:
        return np.zeros(shape, np.float32)
    if name.endswith("_norm/scale"):
        return np.ones(shape, np.float32)
    deviation = DEPTHWISE_DEVIATION if "depthwise" in name else DEVIATION
    normal = np.random.default_rng([seed, layer, *name.encode()]).standard_normal
    return normal(shape, np.float32) * np.float32(deviation)


def _depth_of(checkpoint: Checkpoint, flag: str) -> int:
    if checkpoint.dit is None:
        raise UserError(f"{flag} is for a checkpoint with a transformer; --source has none")
    return checkpoint.dit.depth


def _replaced(checkpoint: Checkpoint, depth: int, change, told: dict[str, Any]) -> Checkpoint:
    """Returns the checkpoint with every stack of the blocks changed, and a line of provenance."""
    dit = checkpoint.params["dit"]
    blocks = jax.tree.map_with_path(change, dit["blocks"])
    before = checkpoint.provenance.get("depth")
    history = [*(before if isinstance(before, list) else []), told]
    return dataclasses.replace(
        checkpoint,
        dit=dataclasses.replace(checkpoint.dit, depth=depth),
        params={**checkpoint.params, "dit": {**dit, "blocks": blocks}},
        provenance={**checkpoint.provenance, "depth": history},
    )
