"""The kinds of faults: functions that start a trial's command and let something happen to it."""

import shutil
import signal
import time
from pathlib import Path

from tests.faults.jobs import INTERVAL, STEPS
from tests.faults.trial import SIGNALS, Trial

YEAR = 365 * 86400.0
LOCKS = "cut", "empty", "nul", "nuls"


def _signal(trial: Trial, name: str) -> None:
    """A signal to one process, at a change of a file or some time after an event."""
    number, index = SIGNALS[name], trial.rng.randrange(trial.count)
    if trial.rng.random() < 0.5:
        at = trial.rng.randint(1, trial.changes)  # as the first process makes them
        trial.note(f"{name} at change {at}")
        trial.start({"folder": str(trial.work), "at": at, "signal": number})
        trial.group.processes[0].sent.append(number)
    else:
        trial.note(f"{name} to {index} of {trial.count}" if trial.count > 1 else name)
        trial.start()
        if trial.until(trial.moment()):
            trial.send(number, index)


def kill(trial: Trial) -> None:
    _signal(trial, "kill")


def term(trial: Trial) -> None:
    _signal(trial, "term")


def interrupt(trial: Trial) -> None:
    _signal(trial, "int")


def begin(trial: Trial) -> None:
    """A signal in the first seconds, while modules are imported."""
    name = trial.rng.choice(["term", "int", "int", "kill"])
    trial.note(name)
    trial.start(cold=True)
    if trial.until(("time", 0, round(trial.rng.uniform(0.3, 5.0), 2))):
        trial.send(SIGNALS[name], trial.rng.randrange(trial.count))


def twice(trial: Trial) -> None:
    """A second signal while the first is obeyed."""
    names = [trial.rng.choice(["term", "int"]) for _ in range(2)]
    trial.note(" and ".join(names))
    trial.start()
    if trial.until(trial.moment()):
        trial.send(SIGNALS[names[0]])
        time.sleep(round(trial.rng.uniform(0, 0.3), 2))
        trial.send(SIGNALS[names[1]])


def stop(trial: Trial) -> None:
    """A pause, as of a machine that is moved; no restart is needed."""
    trial.start()
    index = trial.rng.randrange(trial.count)
    if trial.until(trial.moment()):
        seconds = round(trial.rng.uniform(0.2, 2), 1)
        trial.note(f"{seconds} s")
        trial.send(signal.SIGSTOP, index)
        time.sleep(seconds)
        trial.send(signal.SIGCONT, index)
    trial.end(expected=(0,))


def _interrupted(trial: Trial, moment=None) -> None:
    """Kills the command when something is saved."""
    trial.start()
    if trial.until(moment or trial.moment(late=True)):
        for index in range(trial.count):
            trial.send(signal.SIGKILL, index)
    trial.end()
    trial.group = None


def damage(trial: Trial, path: Path, ways=("byte", "cut", "gone", "empty", "nul")) -> None:
    way, content = trial.rng.choice(ways), path.read_bytes()
    trial.note(f"{path.relative_to(trial.work)} {way}")
    at = trial.rng.randrange(max(1, len(content)))
    if way == "gone":
        path.unlink()
        return
    byte = bytes([content[at] ^ (1 << trial.rng.randrange(8))]) if content else b""
    path.write_bytes(
        {
            "byte": content[:at] + byte + content[at + 1 :],
            "cut": content[:at],
            "empty": b"",
            "nul": content[:at] + b"\0" * (len(content) - at),
            "half": content + content.splitlines(keepends=True)[-1][:-20] if content else b"",
            "garbage": content + bytes(trial.rng.randrange(256) for _ in range(40)),
            "nuls": content + b"\0" * 40,
            "nested": content + b"[" * 100_000 + b"\n",
        }[way]
    )


def rot(trial: Trial) -> None:
    """The newest checkpoint is damaged between two starts."""
    _interrupted(trial, ("saved", INTERVAL * trial.rng.randint(2, STEPS // INTERVAL), 0.1))
    steps = trial.job.steps(trial.work)
    if len(steps) < 2:
        return trial.note("nothing to damage")
    folder = trial.job.folder(trial.work) / "checkpoints" / str(steps[-1])
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    damage(trial, trial.rng.choice(files))
    trial.lost = 1


def torn(trial: Trial) -> None:
    """A file that is written bit by bit is as a kill or a power cut leaves it."""
    _interrupted(trial)
    folder = trial.job.folder(trial.work)
    files = [folder / name for name in ("metrics.jsonl", ".sana_jax.lock", "manifest.jsonl")]
    files = sorted(path for path in [*files, *folder.glob("tensorboard/*")] if path.exists())
    if not files:
        return trial.note("nothing to tear")
    path = trial.rng.choice(files)
    lock = path.name == ".sana_jax.lock"
    damage(trial, path, LOCKS if lock else ("half", "garbage", "nuls", "nested"))


def model(trial: Trial) -> None:
    """The result of a run that is over is cut short or goes; the same command mends it."""
    trial.start()
    if not trial.end(expected=(0,)):
        return trial.faults.append("an unbroken run did not end")
    trial.group = None
    files = sorted(path for path in (trial.work / "model").rglob("*") if path.is_file())
    damage(trial, trial.rng.choice(files))
    trial.start()


ERRNOS = {"full": 28, "quota": 122, "broken": 5, "stale": 116, "read-only": 30, "forbidden": 13}


def disk(trial: Trial) -> None:
    """From some change of a file on, a number of them fail."""
    name, index = trial.rng.choice([*ERRNOS, "full"]), trial.rng.randrange(trial.count)
    at, length = trial.rng.randint(1, trial.changes), trial.rng.choice([1, 3, 10**6])
    trial.note(f"{name} from change {at} for {length}")
    fault = {"folder": str(trial.work), "at": at, "errno": ERRNOS[name], "for": length}
    trial.start(fault, faulty=index)
    allowed = (0, 75, 2) if name in ("read-only", "forbidden") else (0, 75)
    if not trial.end(allowed):
        trial.group = None  # a status 2 is mended, as there is space again


def small(trial: Trial) -> None:
    """No file may grow beyond a size from some moment on, which is how a full disk is met below
    Python."""
    import resource

    trial.start()
    index, size = trial.rng.randrange(trial.count), trial.rng.choice([20_000, 100_000])
    trial.note(f"{size} bytes")
    if trial.until(trial.moment()):
        process = trial.group.processes[index]
        if process.poll() is None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))


def second(trial: Trial) -> None:
    """The same command again, while the first is alive."""
    trial.start()
    if not trial.until(("locked", 0, trial.moment()[2])):
        return
    other = trial.start(name="second", count=1)
    trial.faults += other.wait(300)
    process = other.processes[0]
    trial.read(process)
    trial.note(f"second: {process.status}")
    if process.status == 0 and trial.group.over():
        return
    if process.status != 2 or "another run" not in process.said():
        trial.faults.append(f"second: {process.status} {process.said().strip()[-100:]}")


def clock(trial: Trial) -> None:
    """The clock is wrong, and jumps; the next start has another clock."""
    shifts = [0.0, 3600.0, -86400.0, YEAR, -YEAR, 12 * YEAR, -30 * YEAR]

    def start():
        calls = trial.rng.randint(1, 300)
        jumps = [[0, trial.rng.choice(shifts)], [calls, trial.rng.choice(shifts)]]
        trial.note(f"clock {jumps[0][1]:+g}s then {jumps[1][1]:+g}s")
        trial.start({"clock": jumps}, cold=True)

    start()
    if trial.until(trial.moment()):
        trial.send(signal.SIGTERM)
        if not trial.end():
            start()


def moved(trial: Trial) -> None:
    """The folder is renamed under the run, and renamed back when that has ended."""
    trial.start()
    if not trial.until(trial.moment()):
        return
    away = trial.home / "away"
    trial.work.rename(away)
    trial.end(expected=(0, 75, 2))
    left = sorted(path.name for path in trial.work.rglob("*")) if trial.work.exists() else []
    if left:
        trial.note(f"made again: {', '.join(left)[:60]}")
    shutil.rmtree(trial.work, ignore_errors=True)
    away.rename(trial.work)
    trial.group = None


def away(trial: Trial) -> None:
    """The inputs are away when a run comes back that has something to resume."""
    _interrupted(trial)
    home = trial.job.home
    names = {"text_to_image": "stored", "autoencoder": "train"}
    data = home / names[trial.job.name]
    data.rename(data.with_name("away"))
    try:
        trial.start()
        trial.end(expected=(0, 75))
    finally:
        data.with_name("away").rename(data)
    trial.group = None


def combined(trial: Trial) -> None:
    """Several of the others, one after another."""
    for kind in trial.rng.sample([kill, term, interrupt, twice, rot, torn], 3):
        trial.note(f"[{kind.__name__}]")
        kind(trial)
        if trial.faults or (trial.group and trial.end()):
            return  # it is done already, or will not be
    trial.group = None


# How often each is tried among a hundred: (kind, job, processes): times.
PLAN = {
    (kill, "text_to_image", 1): 6,
    (kill, "autoencoder", 1): 4,
    (kill, "numbers", 1): 6,
    (kill, "numbers", 2): 4,
    (kill, "numbers", 4): 2,
    (kill, "text_to_image", 2): 2,
    (kill, "sample", 1): 4,
    (term, "text_to_image", 1): 3,
    (term, "autoencoder", 1): 2,
    (term, "numbers", 1): 2,
    (term, "numbers", 2): 2,
    (term, "numbers", 4): 1,
    (term, "sample", 1): 2,
    (interrupt, "text_to_image", 1): 2,
    (interrupt, "autoencoder", 1): 1,
    (interrupt, "numbers", 2): 1,
    (interrupt, "sample", 1): 2,
    (begin, "text_to_image", 1): 3,
    (begin, "autoencoder", 1): 1,
    (begin, "sample", 1): 2,
    (twice, "numbers", 1): 2,
    (stop, "numbers", 1): 1,
    (stop, "numbers", 2): 1,
    (stop, "text_to_image", 1): 1,
    (rot, "text_to_image", 1): 3,
    (rot, "autoencoder", 1): 1,
    (rot, "numbers", 1): 3,
    (rot, "numbers", 2): 1,
    (torn, "text_to_image", 1): 2,
    (torn, "autoencoder", 1): 2,
    (torn, "numbers", 1): 3,
    (torn, "sample", 1): 2,
    (model, "text_to_image", 1): 2,
    (model, "autoencoder", 1): 1,
    (disk, "text_to_image", 1): 2,
    (disk, "autoencoder", 1): 1,
    (disk, "numbers", 1): 2,
    (disk, "numbers", 2): 1,
    (disk, "sample", 1): 1,
    (small, "text_to_image", 1): 2,
    (small, "autoencoder", 1): 1,
    (second, "numbers", 1): 1,
    (second, "text_to_image", 1): 1,
    (second, "sample", 1): 1,
    (clock, "numbers", 1): 2,
    (clock, "sample", 1): 1,
    (moved, "numbers", 1): 2,
    (moved, "text_to_image", 1): 1,
    (away, "text_to_image", 1): 1,
    (combined, "numbers", 1): 3,
}
assert sum(PLAN.values()) == 100
