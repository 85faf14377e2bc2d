"""The processes of a command: one, or several that meet over jax.distributed, as launch/local does.

Most are forked from this process, which has imported the modules of the commands but opened no
device: half of the time of a tiny training is imports. A `cold` one is a Python of its own.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests import xla

ROOT = Path(__file__).parents[2]
SITE = Path(__file__).parent / "site"
# Seconds for the processes that are left, to end by themselves after one has failed: JAX's
# heartbeat tells them after 100 where they wait for it at a barrier.
GRACE = 150.0
POLL = 0.01
# JAX reads its own when it is imported, here before the commands are forked.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "HF_HUB_OFFLINE": "1",
    "XLA_FLAGS": xla.flags(devices=1),
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
MODULES = (
    "sana_jax.training.command",
    "sana_jax.training.text_to_image.run",
    "sana_jax.training.autoencoder.run",
    "sana_jax.pipeline.pipeline",
    "sana_jax.batch.tasks",
    "sana_jax.checkpoints.load",
    "transformers",
)


def prepare() -> None:
    """Imports what the commands import. Call it before anything else imports JAX."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's & ignores
    os.environ.update(ENVIRONMENT)
    for name in MODULES:
        importlib.import_module(name)
    from sana_jax.text.tokenizers import import_transformers

    import_transformers()
    gc.freeze()


class Process:
    """A command that runs; its output goes to a file.

    Attributes:
      status: None while it runs, then its exit status, negative for a signal.
      sent: the signals that it was sent.
      seconds: of a processor, once it is over.
      rows: how many the command had written at the last signal.
    """

    def __init__(self, module, arguments, output: Path, environment, fault=None, cold=False):
        self.output, self.status, self.sent, self.seconds = output, None, [], 0.0
        self.rows = 10**9
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | environment
        if fault:
            environment["SANA_FAULT"] = json.dumps(fault)
        if cold:
            if fault:
                environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{SITE}"
            with output.open("ab") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", module, *arguments],
                    cwd=output.parent,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            self.pid = process.pid
            process.returncode = 0  # it is this class that waits
            return
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            _become(module, arguments, output, environment)

    def poll(self) -> int | None:
        if self.status is None:
            pid, status, used = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
                self.seconds = used.ru_utime + used.ru_stime
        return self.status

    def send(self, number: int) -> None:
        if self.poll() is None:
            self.sent.append(number)
            os.kill(self.pid, number)

    def said(self) -> str:
        return self.output.read_text(errors="replace")


def _become(module, arguments, output, environment) -> None:
    """Turns a forked process into `python -m module arguments`; it does not return."""
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in 1, 2:
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(output.parent)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    status = 1
    try:
        if "SANA_FAULT" in environment:
            runpy.run_path(str(SITE / "sitecustomize.py"))
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:  # as an interpreter ends, without a return into the callers of this function
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Group:
    """The processes of one start of a command."""

    def __init__(self, processes: list[Process]):
        self.processes, self.began = processes, time.monotonic()

    def over(self) -> bool:
        return all([process.poll() is not None for process in self.processes])

    def send(self, number: int, index: int = 0) -> None:
        self.processes[index].send(number)

    def wait(self, seconds: float) -> list[str]:
        """Waits for the end of all; returns complaints about those that did not end."""
        end, failed, complaints = time.monotonic() + seconds, None, []
        while not self.over():
            time.sleep(POLL)
            now = time.monotonic()
            if failed is None and any(process.status for process in self.processes):
                failed = now
            left = [index for index, p in enumerate(self.processes) if p.status is None]
            if now > end or (failed and now > failed + GRACE):
                late = f"{now - failed:.0f} s after another" if failed else f"{seconds:.0f} s"
                complaints.append(f"hang: process {left} still there after {late}")
                for index in left:
                    self.send(signal.SIGKILL, index)
                end, failed = now + seconds, now
        return complaints

    def kill(self) -> None:
        for process in self.processes:
            process.send(signal.SIGKILL)
            while process.poll() is None:
                time.sleep(POLL)


def start(module, arguments, outputs: list[Path], fault=None, cold=False, faulty=0) -> Group:
    """Starts a process for each output; only the one of index `faulty` has the fault."""
    count, port = len(outputs), _free_port()
    processes = []
    for index, output in enumerate(outputs):
        environment, more = {}, []
        if count > 1:
            environment = {
                "JAX_COORDINATOR_PORT": str(port),
                "OMPI_MCA_orte_hnp_uri": f"0.0;tcp://127.0.0.1:{port}",
                "OMPI_COMM_WORLD_SIZE": str(count),
                "OMPI_COMM_WORLD_RANK": str(index),
                "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
            }
            more = ["--multihost"]
        given = module, [*arguments, *more], output, environment
        processes.append(Process(*given, fault if index == faulty else None, cold))
    return Group(processes)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
