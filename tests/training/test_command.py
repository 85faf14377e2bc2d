"""What commands for training make of lost hosts, of devices that do not open and of memory."""

import os
import signal
import socket
import subprocess
import sys
from unittest import mock

import jax
import pytest
from absl import flags
from ml_collections.config_flags import config_flags

from sana_jax.runtime.errors import Retry, UserError
from sana_jax.training import command
from tests import PATIENCE, xla


@pytest.mark.parametrize(
    "hosts, error, kind",
    [
        (2, jax.errors.JaxRuntimeError("INTERNAL: Gloo: Connection closed by peer"), Retry),
        (2, ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"), Retry),
        (2, jax.errors.JaxRuntimeError("INVALID_ARGUMENT: a bug"), jax.errors.JaxRuntimeError),
        (2, ValueError("a bug"), ValueError),
        (1, jax.errors.JaxRuntimeError("INTERNAL: a bug"), jax.errors.JaxRuntimeError),
    ],
)
def test_a_lost_host_is_worth_another_try(monkeypatch, hosts, error, kind):
    class Training:
        def __init__(self, config, workdir):
            pass

        def run(self):
            raise error

    monkeypatch.setattr(jax, "process_count", lambda: hosts)
    with pytest.raises(kind, match=str(error).partition(":")[0]):
        command.run(Training, None, "run")


def test_an_abort_below_python_is_worth_another_try():
    """As by JAX, from a thread of its own, after app.run has installed the faulthandler."""
    code = (
        "import faulthandler, os, threading\n"
        "from sana_jax.training import command\n"
        "faulthandler.enable()\n"
        "command.retry_after_abort()\n"
        "threading.Thread(target=os.abort).start()\n"
        "threading.Event().wait()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 75, result
    assert result.stderr.splitlines()[-1].startswith("error: another host is lost")


LOSE = """
import sys
import jax
from sana_jax.runtime import cli
from sana_jax.training import command
from tests.training import toy_run
workdir, host, port, *settings = sys.argv[1:]
class Training:
    def __init__(self, config, workdir):
        pass
    def run(self):
        toy_run.main(["", workdir, f"host=[{host},2,{port}]", *settings])
def main(argv):
    jax.distributed.initialize(f"localhost:{port}", 2, int(host), heartbeat_timeout_seconds=10)
    command.retry_after_abort()
    command.run(Training, None, workdir)
sys.argv = sys.argv[:1]
cli.run(main)
"""


@pytest.mark.slow  # half a minute each: a host is missed after ten seconds
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("batch", [0, 3, 7])
def test_the_host_that_is_left_ends_with_75(tmp_path, killed, batch):
    """Before the first step, in the second, and after a checkpoint."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "XLA_FLAGS": xla.flags(devices=2)}
    runs = []
    for host in 0, 1:
        arguments = [sys.executable, "-c", LOSE, tmp_path / "run", str(host), port]
        arguments += [f"kill_at={batch}"] * (host == killed)
        runs.append(subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment))
    _, errors = runs[1 - killed].communicate(timeout=PATIENCE)
    runs[killed].communicate()
    assert runs[killed].returncode == -signal.SIGKILL
    assert runs[1 - killed].returncode == 75, errors
    assert "Traceback" not in errors and "host" in errors.splitlines()[-1], errors


def test_a_folder_that_saves_what_nobody_reads_is_refused_at_once():
    with pytest.raises(UserError, match="could not be read back"):
        command.run(lambda config, workdir: pytest.fail("too late"), None, "runs [1]/a")


@pytest.mark.parametrize("hosts", [1, 2])
def test_too_large_a_batch_is_the_user_s(monkeypatch, hosts):
    def make_training(config, workdir):
        message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 30.25G of 15.75G"
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax, "process_count", lambda: hosts)
    with pytest.raises(UserError, match="for the 30.25G asked for; try a smaller batch_size"):
        command.run(make_training, None, "run")


@pytest.mark.parametrize("multihost, kind", [(True, Retry), (False, UserError)])
def test_chips_that_do_not_open(monkeypatch, multihost, kind):
    """Of several hosts one may still be giving them back."""

    def busy():
        raise RuntimeError("Unable to initialize backend 'tpu': the TPU is in use\nby another")

    monkeypatch.setattr(jax, "devices", busy)
    with pytest.raises(kind, match="no device for JAX_PLATFORMS=.*the TPU is in use$"):
        command.open_devices(multihost)


@pytest.mark.parametrize(
    "error, kind", [(RuntimeError("DEADLINE_EXCEEDED: x"), Retry), (ValueError("none."), UserError)]
)
def test_hosts_that_do_not_come(monkeypatch, error, kind):
    def initialize(**settings):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(kind, match="did not come: DEAD|--multihost: none; leave"):
        command.join_hosts()


@pytest.mark.parametrize(
    "file, value, wanted",
    [
        ("shapes", "None", None),
        ("shapes", "2.0", 2.0),
        ("sana_600m_512", "1.0", 1.0),
        ("sana_600m_512", "None", None),
        ("sana_600m_512", "wide", "wide"),  # which the network's config refuses
    ],
)
def test_a_flag_gives_positions_and_takes_them_away(file, value, wanted):
    known = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=known)
    line = ["", f"--config=configs/{file}.py", f"--config.network.interpolation_scale={value}"]
    with mock.patch.object(sys, "argv", line):  # in which the flag looks for changes of fields
        known(line)
    assert config.value.network.interpolation_scale == wanted
