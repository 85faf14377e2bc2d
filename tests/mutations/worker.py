"""Reads mutated inputs in a process of its own: one line of stdin is one input.

    python -m tests.mutations.worker EXAMPLES

EXAMPLES is a copy of what inputs.write wrote, for this process alone. A line "NAME<tab>SEED<tab>I"
is answered by a line of JSON: what became of it, and how long it took. I = -1 is the example.
"""

import gc
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from random import Random

ADDRESS_SPACE = 2**30  # bytes that one input may take besides what the process has


def content_of(name: str, seed: int, i: int, example: bytes) -> bytes:
    """Returns the mutated content number `i` of an input; of -1 the example."""
    from tests.mutations.inputs import INPUTS

    if i < 0:
        return example
    return INPUTS[name].mutated(example, Random(f"{name} {seed} {i}"))


def attempt(folder: Path, name: str, seed: int, i: int) -> dict:
    """Reads one mutated input. Returns {"how": "read", "refused" or "failed", "why": ...}."""
    from sana_jax.data.images import BadImage
    from sana_jax.runtime.errors import Retry, UserError
    from tests.mutations.inputs import INPUTS

    path = folder / INPUTS[name].file
    example = path.read_bytes()
    path.write_bytes(content_of(name, seed, i, example))
    before = time.process_time()
    try:
        _limit(_address_space() + ADDRESS_SPACE if i >= 0 else resource.RLIM_INFINITY)
        try:
            INPUTS[name].read(folder)
            found = {"how": "read"}
        except (UserError, Retry, BadImage) as error:
            found = _judged(error)
        except BaseException as error:
            found = _failed(error)
        finally:
            _limit(resource.RLIM_INFINITY)
    finally:
        path.write_bytes(example)
    return found | {"seconds": time.process_time() - before}


def _judged(error: Exception) -> dict:
    """Returns "failed" for a refusal that no user can read, or that hides a lack of memory."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return _failed(cause)
        cause = cause.__cause__ or cause.__context__
    if len(str(error)) > 5000:
        return {"how": "failed", "why": f"a message of {len(str(error))} letters: {error!s:.100}"}
    return {"how": "refused", "why": " ".join(str(error).split())[:300]}


def _failed(error: BaseException) -> dict:
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "/sana_jax/" in f.filename]
    where = f"{ours[-1].filename.rpartition('/sana_jax/')[2]}:{ours[-1].lineno}" if ours else "?"
    why = f"{where} {type(error).__name__}: {error!s:.100}"
    return {"how": "failed", "why": " ".join(why.split()), "kind": f"{where} {type(error)}",
            "trace": "".join(traceback.format_exception(error)[-12:])[-3000:]}  # fmt: skip


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _limit(most: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in 1, 2:  # what readers print and warn of
        os.dup2(quiet, stream)
    folder = Path(sys.argv[1])
    for number, line in enumerate(sys.stdin):
        name, seed, i = line.rstrip("\n").split("\t")
        answers.write(json.dumps(attempt(folder, name, int(seed), int(i))) + "\n")
        if number % 200 == 199:
            gc.collect()


if __name__ == "__main__":
    main()
