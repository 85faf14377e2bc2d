"""Injects random faults into short trainings and batch runs, and compares their ends.

    python -m tests.faults --count=100 --seed=0 [--kinds=kill,rot] [--jobs=1] [--log=FILE]
    python -m tests.faults --seed=0 --only=17        repeats one, and keeps its folder

Each trial starts a command (sana_jax.train, train_dc_ae, sample, or the frame of the trainings
around eight numbers; one, two or four processes), lets something happen to it, and starts it again
as a launcher does, until it is done. Then its files must be those of a run that nothing happened
to, to the bit; no start may hang, print a traceback or end with a status that is not documented.
The status is 1 if any trial failed.
"""

import argparse
import collections
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import kinds, processes
from tests.faults.jobs import JOBS
from tests.faults.trial import Trial


def plan(seed: int, number: int):
    """Returns the kind, the job and the processes of a trial; each hundred has all of the plan."""
    deck = [key for key, times in kinds.PLAN.items() for _ in range(times)]
    random.Random(f"deck {seed} {number // len(deck)}").shuffle(deck)
    return deck[number % len(deck)]


class Runner:
    """Runs trials by number."""

    def __init__(self, folder: Path, seed: int, keep: bool):
        self.folder, self.seed, self.keep = folder, seed, keep
        self.changes = {}

    def prepare(self, wanted) -> None:
        """Makes the inputs and the unbroken runs of these (job, processes)."""
        for name in sorted({name for name, _ in wanted}):
            given, log = [name, str(self.folder)], self.folder / f"{name}.log"
            maker = processes.Process("tests.faults.jobs", given, log, {})
            if processes.Group([maker]).wait(600) or maker.status:
                sys.exit(f"{name} could not be prepared: {maker.said()}")
        for name, count in sorted(wanted):
            home, began = self.folder / f"unbroken_{name}_{count}", time.monotonic()
            trial = Trial(JOBS[name](self.folder), count, home, random.Random(0))
            counted = trial.home / "changes"
            trial.start({"folder": str(trial.work), "count": str(counted)})
            if not trial.end(expected=(0,)) or trial.faults:
                sys.exit(f"the unbroken run failed: {trial.faults}, see {trial.home}")
            self.changes[name, count] = int(counted.read_text())
            took = f"{time.monotonic() - began:.0f} s ({trial.seconds():.0f})"
            print(f"unbroken {name} x {count}: {took}", flush=True)

    def run(self, number: int):
        """Returns (number, kind, line, faults, restarts)."""
        kind, name, count = plan(self.seed, number)
        began, home = time.monotonic(), self.folder / f"trial{number}"
        rng = random.Random(f"trial {self.seed} {number}")
        trial = Trial(JOBS[name](self.folder), count, home, rng, self.changes[name, count])
        try:
            kind(trial)
            trial.finish()
            if not trial.faults:
                trial.compare(self.folder / f"unbroken_{name}_{count}/work")
        finally:
            trial.close()
        where = f"{name} x {count}" if count > 1 else name
        took = f"{time.monotonic() - began:.0f} s ({trial.seconds():.0f})"
        result = "FAILED: " + "; ".join(trial.faults) if trial.faults else "equal"
        line = f"{number:4d} {kind.__name__:9s} {where:17s} {took:11s} {', '.join(trial.notes)};"
        line += f" {trial.starts - 1} restarts: {result}"
        print(line, flush=True)
        if trial.faults:
            again = f"python -m tests.faults --seed={self.seed} --only={number}"
            print(f"     again: {again}; its folder: {home}", flush=True)
        elif not self.keep:
            shutil.rmtree(home, ignore_errors=True)
        return number, kind.__name__, line, trial.faults, trial.starts - 1


def table(results) -> str:
    by_kind = collections.defaultdict(list)
    for _, kind, _, faults, restarts in results:
        by_kind[kind].append((bool(faults), restarts))
    lines = ["| fault | trials | equal | failed | restarts |", "|---|---|---|---|---|"]
    everything = [x for found in by_kind.values() for x in found]
    for kind, found in [*sorted(by_kind.items()), ("all", everything)]:
        failed, restarts = (sum(column) for column in zip(*found, strict=True))
        row = kind, len(found), len(found) - failed, failed, restarts
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def numbers_of(given) -> list[int]:
    """Returns the numbers of the trials that the flags ask for."""
    if given.only:
        return [int(number) for number in given.only.split(",")]
    wanted = given.kinds.split(","), given.commands.split(",")

    def is_wanted(number):
        kind, command, _ = plan(given.seed, number)
        return kind.__name__ in wanted[0] and command in wanted[1]

    numbers = filter(is_wanted, itertools.count())
    return list(itertools.islice(numbers, given.count))


def run_all(runner: Runner, numbers: list[int], jobs: int) -> list:
    """Runs trials, in processes of their own if `jobs` is above 1; each trial prints its line."""

    def some(numbers):
        return [runner.run(number) for number in numbers]

    if jobs == 1:
        return some(numbers)
    workers = []
    for worker in range(jobs):
        path = runner.folder / f"worker{worker}.json"
        pid = os.fork()
        if not pid:
            path.write_text(json.dumps(some(numbers[worker::jobs])))
            os._exit(0)
        workers.append((pid, path))
    for pid, _ in workers:
        os.waitpid(pid, 0)
    return [result for _, path in workers for result in json.loads(path.read_text())]


def flags() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    names = ",".join(sorted({kind.__name__ for kind, *_ in kinds.PLAN}))
    parser.add_argument("--count", type=int, default=100, help="number of trials (100)")
    parser.add_argument("--seed", type=int, default=0, help="decides all of them (0)")
    parser.add_argument("--only", help="the numbers of some trials, with commas")
    parser.add_argument("--kinds", default=names, help="the kinds to try, with commas (all)")
    parser.add_argument("--commands", default=",".join(JOBS), help="likewise the commands (all)")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time (1)")
    parser.add_argument("--folder", type=Path, help="a new folder to work in (a temporary one)")
    parser.add_argument("--log", type=Path, help="a file for the lines and the table")
    given = parser.parse_args()
    for flag, known in ("kinds", names.split(",")), ("commands", JOBS):
        if unknown := set(getattr(given, flag).split(",")) - set(known):
            parser.error(f"--{flag}: {', '.join(unknown)} is none of {', '.join(known)}")
    return given


def main() -> None:
    given = flags()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends what was started, too
    numbers = numbers_of(given)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="faults."))
    folder.mkdir(parents=True, exist_ok=True)
    processes.prepare()
    began, runner = time.monotonic(), Runner(folder.absolute(), given.seed, bool(given.only))
    runner.prepare({plan(given.seed, number)[1:] for number in numbers})
    results = sorted(run_all(runner, numbers, given.jobs))
    seconds = f"{time.monotonic() - began:.0f} s"
    end = f"{table(results)}\n\n{len(results)} trials, seed {given.seed}: {seconds}"
    print(f"\n{end}")
    if given.log:
        given.log.write_text("\n".join([*(line for _, _, line, *_ in results), "", end, ""]))
    if any(faults for *_, faults, _ in results):
        sys.exit(1)
    if not given.only and not given.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
