"""Multi-host helpers: an error on one host is raised on all of them.

All but `is_loss` and `log_first_host` are collective: every host must call them. With one host they
cost nothing.
"""

import contextlib
import pickle
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sana_jax.runtime.errors import UserError

# Errors of JAX for a program that is wrong or too large, which fails again at every retry.
OURS = "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED"


def is_loss(error: BaseException | None) -> bool:
    """Returns True for an error of JAX that the loss of another host may have caused.

    On CPUs, where Gloo connects the hosts, a small program runs as it is dispatched, and the error
    is a ValueError there; otherwise it is a JaxRuntimeError where its result is awaited. Libraries
    raise errors of their own from these.
    """
    if error is None or jax.process_count() == 1 or any(mark in str(error) for mark in OURS):
        return False
    gloo = type(error) is ValueError and "gloo" in str(error).lower()
    lost = gloo or isinstance(error, jax.errors.JaxRuntimeError)
    return lost or is_loss(error.__cause__)


def log_first_host(line: str) -> None:
    """Prints a line to stderr, on the first host only."""
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):  # who listened may have gone
            print(line, file=sys.stderr, flush=True)


def gather_values(value: Any) -> list[Any]:
    """Returns the values of all hosts, in their order. They travel pickled."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(data.size)).max())
    rows = multihost_utils.process_allgather(np.pad(data, (0, longest - data.size)))
    return [pickle.loads(row.tobytes()) for row in rows]


def gather_arrays(tree: Any) -> Any:
    """Returns a tree of arrays that are sharded over the hosts, complete on each of them."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.process_allgather(tree, tiled=True)


def raise_together(action: Callable[..., Any], *args: Any) -> Any:
    """Returns action(*args). If it fails on any host, all hosts raise the first one's error.

    `action` should not be collective itself, or the other hosts may wait for one that failed.
    """
    value = error = None
    try:
        value = action(*args)
    except Exception as caught:
        if isinstance(caught, jax.errors.JaxRuntimeError) or is_loss(caught):
            raise  # the other host would never answer
        error = caught
    # Kinds of UserError may take more than a message, so that they travel as UserErrors.
    kind = UserError if isinstance(error, UserError) else type(error)
    for host, told in enumerate(gather_values(error and (kind, str(error)))):
        if error and host == jax.process_index():
            raise error
        if told:
            kind, message = told
            raise kind(message) from error
    return value


def on_first_host(action: Callable[..., Any], *args: Any) -> Any:
    """Calls action(*args) on the first host; all hosts return its value or raise its error."""
    is_first = jax.process_index() == 0
    return gather_values(
        raise_together(action, *args) if is_first else raise_together(lambda: None)
    )[0]
