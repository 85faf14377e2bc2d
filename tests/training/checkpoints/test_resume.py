"""A run that is killed or terminated ends, to the bit, as one that is not interrupted."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from etils import epath

from sana_jax.runtime.errors import UserError
from sana_jax.runtime.lock import locked
from tests import xla
from tests.training import toy_run

SETTINGS = ["steps=40", "checkpoint_every=4", "log_every=2"]  # so no row spans two runs


def start(workdir, *settings, **environment):
    command = [sys.executable, "-m", "tests.training.toy_run", workdir, *SETTINGS, *settings]
    pipe = subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": os.getcwd()} | environment
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def finish(workdir, capsys, *settings):
    """Runs to the end in this process; returns the hash that the run prints."""
    toy_run.main(["", workdir, *SETTINGS, *settings])
    return capsys.readouterr().out.strip()


def newest(workdir):
    names = [path.name for path in workdir.glob("checkpoints/*")]
    return max([int(name) for name in names if name.isdecimal()], default=0)


def losses(workdir):
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in found]


def test_killed_twice_and_terminated(tmp_path, capsys):
    whole = finish(tmp_path / "whole", capsys)
    broken = tmp_path / "broken"
    for _ in range(2):
        before, run = newest(broken), start(broken, "sleep=0.05")
        while newest(broken) == before and run.poll() is None:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, run.communicate()
    with pytest.raises(UserError, match="--workdir=.* is of another run: config.width: 32 -> 64"):
        finish(broken, capsys, "width=64")
    run = start(broken, "terminate_at=38")
    _, errors = run.communicate()
    # The signal comes while batch 38 is read, and step 37 or 38 runs.
    stopped = re.search("^stopped by SIGTERM after step (38|39) of 40: saved", errors, re.M)
    assert run.returncode == 75 and stopped, errors
    assert newest(broken) == int(stopped[1])
    assert finish(broken, capsys) == whole
    # The last row may be of step 40 alone.
    assert losses(broken)[:-1] == losses(tmp_path / "whole")[:-1]


HOSTS = """
import sys
import jax
from sana_jax.runtime.errors import Stopped, UserError
from sana_jax.training.checkpoints import arrays, manager
from tests.training import toy_run
locked, whole, broken, *settings, first, second = sys.argv[1:]
try:
    toy_run.main(["", locked, *settings])
except UserError as error:
    print(f"refused: {error}")
restore = arrays._restore
def fail(folder, abstract):
    if folder.parent.name == "14":
        raise ValueError("bytes that make no sense")
    return restore(folder, abstract)
if jax.process_index() == 1:  # it sees the folder late, and cannot read its part of step 14
    manager.Checkpoints.steps = lambda self: []
    arrays._restore = fail
toy_run.main(["", whole, *settings])
for accident in first, second:
    try:
        toy_run.main(["", broken, *settings, accident])
    except Stopped as error:
        print(error)
toy_run.main(["", broken, *settings])
"""


def test_two_hosts_one_of_which_is_terminated(tmp_path):
    """Both hosts stop after the same step, also the last, and resume as if nothing had happened.

    What only the first host sees, and what only the second cannot read, decides for both.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    environment["XLA_FLAGS"] = xla.flags(devices=2)
    folders = [tmp_path / name for name in ("locked", "whole", "broken")]
    folders[0].mkdir()
    with locked(epath.Path(folders[0])):
        runs = []
        for host in 0, 1:
            command = [sys.executable, "-c", HOSTS, *folders, "steps=14", "checkpoint_every=5"]
            command += [f"host=[{host},2,{port}]"]
            command += [f"terminate_at={batch if host else 'null'}" for batch in (7, 13)]
            pipe = subprocess.PIPE
            runs.append(
                subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
            )
        results = [run.communicate(timeout=200) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], results
    steps = set()
    for output, _ in results:
        assert re.search(r"^refused: another run \(pid \d+, .*--workdir=.*locked$", output, re.M)
        whole, *lines, broken = re.findall("^(?:[0-9a-f]{64}$|stopped.*)", output, re.M)
        assert whole == broken and len(lines) == 2
        steps.add(tuple(line.partition("after ")[2] for line in lines))
    ((_, last),) = steps
    assert last.startswith("step 14 of 14: saved")
    document = json.loads((tmp_path / "broken/checkpoints/14/run/metadata").read_text())
    assert len(document["iterators"]) == 2
    assert "checkpoint 14 is damaged (its arrays: ValueError: bytes" in results[0][1]
    assert (tmp_path / "broken/checkpoints/14.bad").is_dir()
