"""What commands for training make of lost hosts, of devices that do not open and of memory."""

import jax
import pytest

from sana_jax.runtime.errors import Retry, UserError
from sana_jax.training import command


@pytest.mark.parametrize(
    "hosts, message, kind",
    [
        (2, "INTERNAL: Gloo: Connection closed by peer", Retry),
        (2, "INVALID_ARGUMENT: a bug", jax.errors.JaxRuntimeError),
        (1, "INTERNAL: a bug", jax.errors.JaxRuntimeError),
    ],
)
def test_a_lost_host_is_worth_another_try(monkeypatch, hosts, message, kind):
    class Training:
        def __init__(self, config, workdir):
            pass

        def run(self):
            raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax, "process_count", lambda: hosts)
    with pytest.raises(kind, match=message.partition(":")[0]):
        command.run(Training, None, "run")


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
