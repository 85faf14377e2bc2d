"""Reads a checkpoint's arrays, with the shardings wanted now, and verifies their checksums."""

import contextlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from sana_jax.runtime.errors import Retry
from sana_jax.runtime.hosts import is_loss, raise_together
from sana_jax.training.checkpoints.checksums import checksums
from sana_jax.training.checkpoints.document import Document, brief, some

# TensorStore's codes for storage that does not answer.
_AWAY = re.compile(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED)\b")


class Damaged(Exception):
    """A step cannot be restored; the message names the damaged part."""


@contextlib.contextmanager
def damage(what: str):
    """A context that turns errors of reading `what` into Damaged, or Retry if storage fails."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise Damaged(f"{what}: {brief(error)}") from error
    except OSError as error:
        raise Retry(f"the checkpoints cannot be read: {error}") from error
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as error:  # readers raise anything for bytes that make no sense
        if is_loss(error):
            raise
        if _AWAY.search(str(error)):
            raise Retry(f"the checkpoints cannot be read: {brief(error)}") from error
        raise Damaged(f"{what}: {brief(error)}") from error


def read_arrays(folder: epath.Path, document: Document, wanted: dict[str, Any]) -> dict[str, Any]:
    """Returns the arrays of a step, verified; collective.

    Args:
      folder: the step's folder.
      document: the step's document.
      wanted: the leaves to read, by name, as arrays or ShapeDtypeStructs.

    Raises:
      Damaged: on all hosts, where an array differs from the one that was saved.
      Retry: on all hosts, where the storage does not answer.
    """
    abstract = {name: _abstract(leaf) for name, leaf in wanted.items()}
    saved = {name: leaf[2] for name, leaf in document["leaves"].items()}

    def read():
        with damage("its arrays"):
            return jax.block_until_ready(_restore(folder / "state", abstract))

    arrays = raise_together(read)
    found = checksums(arrays)

    def compare():
        wrong = [name for name in found if found[name] != saved[name]]
        if wrong:
            raise Damaged(f"its checksums: {some(wrong)}")

    raise_together(compare)
    return arrays


def check_saved(folder: epath.Path, document: Document) -> None:
    """Raises Damaged unless the arrays in a step's folder have the document's names and shapes.

    It reads no array.
    """
    with damage("its arrays"), contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        leaves, _ = flatten(reader.metadata(folder / "state").tree)
        found = {name: list(leaf.shape) for name, leaf in leaves.items()}
    if found != {name: leaf[1] for name, leaf in document["leaves"].items()}:
        raise Damaged("its arrays: not those that were saved")


def _restore(folder: epath.Path, abstract: dict[str, Any]) -> dict[str, jax.Array]:
    args = ocp.args.PyTreeRestore(
        abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    # Not in a Checkpointer, which would wait for hosts that may have failed.
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(folder, args=args)


def flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """Returns a tree's leaves by their "/"-joined paths, and the tree's structure."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return dict(zip(names, (leaf for _, leaf in leaves), strict=True)), treedef


def _is_key(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def unwrapped(leaf):
    """Returns the array that is saved for a leaf: of a PRNG key, its data."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _abstract(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    if not _is_key(leaf):
        return leaf
    data = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def wrapped(arrays: dict[str, Any], wanted: dict[str, Any]) -> list[Any]:
    """Returns the leaves in the order of `wanted`; the data of a PRNG key becomes a key again."""

    def wrap(array, leaf):
        return jax.random.wrap_key_data(array, impl=_impl(leaf)) if _is_key(leaf) else array

    return [wrap(arrays[name], leaf) for name, leaf in wanted.items()]


def _impl(leaf) -> str:
    return str(jax.random.key_impl(leaf)) if isinstance(leaf, jax.Array) else leaf.dtype._impl.name
