"""Runs workers, which read mutated inputs, and watches them from outside."""

import collections
import contextlib
import dataclasses
import json
import os
import queue
import select
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from tests import PATIENCE
from tests.mutations import inputs, worker
from tests.mutations.inputs import INPUTS

SECONDS = 10.0  # of computing that one reading may take; most take milliseconds
SLOWER = 25  # of inputs that build networks one mutation in so many is tried
CHUNK = 100  # mutations that a process takes at a time


@dataclasses.dataclass(frozen=True)
class Result:
    name: str  # of the input
    number: int  # of the mutation
    how: str  # "read", "refused" or "failed"
    why: str = ""
    kind: str = ""  # the same for failures in one place
    trace: str = ""
    seconds: float = 0.0


def mutations(
    names: list[str],
    seed: int,
    first: int = 0,
    count: int = 5000,
    jobs: int = 1,
    seconds: float = SECONDS,
    keep: str | None = None,
) -> Iterator[Result]:
    """Yields what became of `count` mutations of each input, as they are read."""
    todo: queue.SimpleQueue = queue.SimpleQueue()
    for name in names:
        numbers = range(first, first + (-(-count // SLOWER) if INPUTS[name].slow else count))
        for i in range(0, len(numbers), CHUNK):
            todo.put((name, numbers[i : i + CHUNK]))
    done: queue.SimpleQueue = queue.SimpleQueue()
    with tempfile.TemporaryDirectory() as made:
        examples = Path(made) / "examples"
        examples.mkdir()
        inputs.write(examples)
        threads = []
        for job in range(jobs):
            own = Path(shutil.copytree(examples, Path(made) / str(job)))
            threads.append(threading.Thread(target=_work, args=(own, seed, seconds, todo, done)))
            threads[-1].start()
        running = jobs
        while running:
            result = done.get()
            if result is None:
                running -= 1
                continue
            if isinstance(result, Exception):
                raise result
            if keep and result.how == "failed":
                _keep(Path(keep), examples, result, seed)
            yield result
        for thread in threads:
            thread.join()


def table(results: list[Result]) -> str:
    """Returns a line for each input: how many were read, refused and failed, and the slowest."""
    counts = collections.defaultdict(collections.Counter)
    slowest: dict[str, float] = collections.defaultdict(float)
    for result in results:
        counts[result.name][result.how] += 1
        slowest[result.name] = max(slowest[result.name], result.seconds)
    hows = "read", "refused", "failed"
    lines = [("input", "count", *hows, "slowest, s")]
    for name, count in counts.items():
        lines.append((name, count.total(), *(count[how] for how in hows), f"{slowest[name]:.1f}"))
    return "\n".join("".join(f"{x!s:<30}" if i == 0 else f"{x!s:>12}" for i, x in enumerate(line))
                     for line in lines)  # fmt: skip


def _work(folder: Path, seed: int, seconds: float, todo, done) -> None:
    """Reads chunks until none is left; a process that dies or hangs is replaced."""
    process = None
    try:
        with contextlib.suppress(queue.Empty):
            while True:
                name, numbers = todo.get_nowait()
                for i in numbers:
                    if process is None:
                        process = _Process(folder)
                    result, process = _read(process, name, seed, i, seconds)
                    done.put(result)
    except Exception as error:  # raised where the results are read
        done.put(error)
    finally:
        if process is not None:
            process.stop()
        done.put(None)


def _read(process: "_Process", name: str, seed: int, i: int, seconds: float):
    if name not in process.warm:  # the first reading imports and compiles
        answer = process.ask(name, seed, -1, PATIENCE)
        if answer is None or answer["how"] != "read":
            raise RuntimeError(f"{name}: the example itself is not read: {answer}")
        process.warm.add(name)
    answer = process.ask(name, seed, i, PATIENCE if PATIENCE < 6 * seconds else 6 * seconds)
    if answer is None:
        code = process.stop()
        why = f"the process died with {code}" if code else f"no end after {6 * seconds:g} s"
        return Result(name, i, "failed", why, why), None
    if answer["seconds"] > seconds and answer["how"] != "failed":
        answer = {"seconds": answer["seconds"], "how": "failed", "kind": "slow",
                  "why": f"{answer['seconds']:.1f} s of computing"}  # fmt: skip
    return Result(name, i, **{"kind": answer.get("why", ""), **answer}), process


class _Process:
    """A worker. `folder` is its own, and is as it was once the process has ended well."""

    def __init__(self, folder: Path):
        self._folder, self._saved = folder, Path(f"{folder}.saved")
        if self._saved.exists():  # the one before ended in the middle of a reading
            shutil.rmtree(folder)
            shutil.copytree(self._saved, folder)
        else:
            shutil.copytree(folder, self._saved)
        self.warm: set[str] = set()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.mutations.worker", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "XLA_FLAGS": ""},
        )

    def ask(self, name: str, seed: int, i: int, seconds: float) -> dict | None:
        """Returns the worker's answer, or None if it died or takes longer than that."""
        try:
            self._process.stdin.write(f"{name}\t{seed}\t{i}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return None
        line = self._process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def stop(self) -> int | None:
        """Ends the process. Returns its status if it had ended by itself."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            code = None
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        return code


def _keep(folder: Path, examples: Path, result: Result, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    example = (examples / INPUTS[result.name].file).read_bytes()
    content = worker.content_of(result.name, seed, result.number, example)
    name = f"{result.name.replace('/', '_').replace(' ', '_')}.{seed}.{result.number}"
    (folder / name).write_bytes(content)
