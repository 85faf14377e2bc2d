"""Several hosts that act as one: what one of them cannot do, none goes on without.

All but `say` are collective, every host must call them; with one host they cost nothing.
"""

import contextlib
import pickle
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def log_first_host(line: str) -> None:
    """On stderr of the first host: what a person waits for, where nothing else shows for long."""
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):  # who listened may have gone
            print(line, file=sys.stderr, flush=True)


def gather_values(value: Any) -> list[Any]:
    """The values of all hosts, which pickle takes, on all hosts."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(data.size)).max())
    rows = multihost_utils.process_allgather(np.pad(data, (0, longest - data.size)))
    return [pickle.loads(row.tobytes()) for row in rows]


def gather_arrays(tree: Any) -> Any:
    """Arrays that are spread over all hosts, in full on each of them."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.process_allgather(tree, tiled=True)


def raise_together(action: Callable[..., Any], *args: Any) -> Any:
    """action(*args) of this host; all hosts raise what the first of those that fail raises.

    An action that is collective itself may keep the others waiting for one that failed.
    """
    value = error = None
    try:
        value = action(*args)
    except jax.errors.JaxRuntimeError:
        raise  # a host may be lost, and would never answer
    except Exception as caught:
        error = caught
    for host, told in enumerate(gather_values(error and (type(error), str(error)))):
        if error and host == jax.process_index():
            raise error
        if told:
            kind, message = told
            raise kind(message) from error
    return value


def on_first_host(action: Callable[..., Any], *args: Any) -> Any:
    """action(*args) of the first host alone, its value or what it raises, on all hosts."""
    is_first = jax.process_index() == 0
    return gather_values(
        raise_together(action, *args) if is_first else raise_together(lambda: None)
    )[0]
