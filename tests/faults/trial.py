"""A trial: a command starts, something happens to it, and it is restarted until it is done."""

import contextlib
import random
import re
import shutil
import signal
import time
from pathlib import Path

from tests.faults import processes
from tests.faults.jobs import INTERVAL, STEPS, Job

RESTARTS = 6  # more than any fault needs
PATIENCE = 400  # seconds for one start of a command
AGAIN = 75
TRACES = "Traceback (most recent call last)", "Fatal Python error", "Exception ignored in"
RAISED = re.compile(r"^(?:[\w.]*(?:Error|Exception|Interrupt|Terminated)\b|Fatal Python).*", re.M)


class Trial:
    """A folder, a command and what has happened to them; kinds.py makes it happen.

    Attributes:
      work: the folder that the command writes.
      notes: what happened, in words.
      faults: what should not have been.
      lost: how many checkpoints the faults may have taken.
      unsaved: whether the last start said that its saves fail.
    """

    def __init__(self, job: Job, count: int, home: Path, rng: random.Random, changes: int = 0):
        self.job, self.count, self.home, self.rng = job, count, home, rng
        self.work, self.changes = home / "work", changes
        self.notes: list[str] = []
        self.faults: list[str] = []
        self.starts, self.lost, self.unsaved = 0, 0, False
        self.group: processes.Group | None = None
        self._ended, self.groups = None, []  # the group whose end was read; all of them
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, fault=None, cold=False, name="", count=None, faulty=0) -> processes.Group:
        """Starts the command's processes, which write to START.INDEX below `home`."""
        self.starts += not name
        name = name or f"start{self.starts}"
        outputs = [self.home / f"{name}.{index}.log" for index in range(count or self.count)]
        arguments = self.job.arguments(self.work)
        group = processes.start(self.job.module, arguments, outputs, fault, cold, faulty)
        self.group = group if name.startswith("start") else self.group
        self.groups.append(group)
        return group

    def until(self, moment: tuple) -> bool:
        """Waits for a moment, (event, number, seconds after it); False if the run ends before."""
        group, (event, number, seconds) = self.group, moment
        begun = time.monotonic()
        self.note(f"{event} {number} +{seconds:g}s" if event != "time" else f"{seconds:g}s")
        happened, under_way = getattr(self, f"_{event}"), event == "time"
        # What a start before this one left has happened too: only while it is locked does it count.
        while not (under_way := under_way or self._locked(0)) or not happened(number):
            if any([process.poll() is not None for process in group.processes]):
                self.note("over before it")
                return False
            if time.monotonic() > begun + PATIENCE:
                self.faults.append(f"hang: no {event} {number}")
                return False
            time.sleep(processes.POLL)
        time.sleep(seconds)
        return True

    def moment(self, late: bool = False) -> tuple:
        """Returns a random moment of a training or of a batch run; `late`: something is saved."""
        seconds = round(self.rng.choice([0, 0, self.rng.uniform(0, 0.3)]), 3)
        if not self.job.trains:
            return self.rng.choice(["locked", "rows"]), self.rng.randint(1, 14), seconds
        events = ["saving", "saved", "rows"] + ([] if late else ["locked", "rows", "model"])
        event, first = self.rng.choice(events), INTERVAL + 1 if late else 1
        if event == "rows":
            return event, self.rng.randint(first, STEPS), seconds
        return event, INTERVAL * self.rng.randint(1, STEPS // INTERVAL), seconds

    def _time(self, number) -> bool:
        return True

    def _locked(self, number) -> bool:
        path = self.job.folder(self.work) / ".sana_jax.lock"
        with contextlib.suppress(OSError):
            return f"pid {self.group.processes[0].pid},".encode() in path.read_bytes()
        return False

    def _rows(self, number) -> bool:
        return len(self.job.rows(self.work)) >= number

    def _saving(self, number) -> bool:
        folder = self.job.folder(self.work) / "checkpoints"
        return self._saved(number) or any(folder.glob(f"{number}.orbax-checkpoint-tmp*"))

    def _saved(self, number) -> bool:
        return max(self.job.steps(self.work), default=0) >= number

    def _model(self, number) -> bool:
        return any(self.job.folder(self.work).glob("model*"))

    def send(self, number: int, index: int = 0) -> None:
        """Sends a signal to one of the processes, and notes how far the command was."""
        process = self.group.processes[index]
        process.send(number)
        process.rows = len(self.job.rows(self.work))

    def end(self, expected=(0, AGAIN)) -> bool:
        """Waits for the end of the last start; returns True if the command is done."""
        group, job = self.group, self.job
        self.faults += group.wait(PATIENCE)
        statuses = [process.status for process in group.processes]
        if group is self._ended:
            return not any(statuses)
        self._ended = group
        self.unsaved = False
        for index, process in enumerate(group.processes):
            allowed = {*expected, *(-number for number in process.sent)}
            if not job.trains and process.sent:
                allowed |= {130, 143}
            if process.status not in allowed:
                self.faults.append(f"start {self.starts}, process {index}: {process.status}")
            asked = {signal.SIGTERM, signal.SIGINT} & {*process.sent}
            if not process.status and asked and process.rows < job.last - 2:
                self.faults.append(f"swallowed: {[*process.sent]} after {process.rows} rows")
            self.read(process)
        self.note("/".join(map(str, statuses)))
        return not any(statuses)

    def read(self, process: processes.Process) -> None:
        """Complains about what a process should not have said."""
        said = process.said()
        self.unsaved |= "could not be saved" in said
        if any(trace in said for trace in TRACES):
            raised = dict.fromkeys(line[:100] for line in RAISED.findall(said))
            self.faults.append(f"traceback: {' / '.join([*raised][:3])}")
        stopped = re.findall(r"^stopped by .* after step (\d+) of \d+: saved", said, re.M)
        if stopped and int(stopped[-1]) not in self.job.steps(self.work):
            self.faults.append(f"lost: step {stopped[-1]} is not there though it said so")

    def finish(self) -> None:
        """Restarts the command as a launcher does, until it is done."""
        done = self.group is not None and self.end()
        before = self.starts
        while not done and not self._gives_up():
            if self.starts - before >= RESTARTS:
                self.faults.append(f"not done after {RESTARTS} restarts")
                return
            rows = 0 if self.unsaved else len(self.job.rows(self.work))
            steps = self.job.steps(self.work)
            self.start()
            done = self.end()
            if not self._gives_up():
                self._check_loss(rows, steps)

    def _gives_up(self) -> bool:
        """Returns True if a process ended with a status after which no launcher tries again."""
        statuses = {process.status for process in self.group.processes} if self.group else set()
        return bool(statuses & {1, 2, 76})

    def _check_loss(self, rows: int, steps: list[int]) -> None:
        """A run that resumes may repeat a save that was going on, and the steps since it began."""
        if not self.job.trains:
            return
        said = self.group.processes[0].said()
        resumed = int((re.findall(r"resumed at step (\d+)", said) or [0])[-1])
        over = "is over; remove" in said
        newest = max(steps, default=0)
        least = (steps or [0])[-1 - self.lost] if len(steps) > self.lost else 0
        if not over and (resumed < least or newest < min(rows, STEPS) - 2 * INTERVAL - 1):
            self.faults.append(f"lost: {rows} rows, saved {steps}, resumed at {resumed}")

    def compare(self, unbroken: Path) -> None:
        """Compares the end with that of the unbroken run."""
        differences = self.job.differences(self.work, unbroken)
        self.faults += [f"differs: {name}" for name in differences]
        if self.job.trains:
            output = self.home / "verify.log"
            given = ["verify", str(self.job.folder(self.work))]
            group = processes.Group([processes.Process("tests.faults.jobs", given, output, {})])
            if group.wait(PATIENCE) or group.processes[0].status:
                self.faults.append("the last checkpoint cannot be read")

    def close(self) -> None:
        for group in self.groups:
            group.kill()

    def seconds(self) -> float:
        """Returns the processor's time of all starts."""
        return sum(process.seconds for group in self.groups for process in group.processes)


SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
