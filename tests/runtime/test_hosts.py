"""One host among several gets what the first one found, or raises what any of them did."""

import jax
import pytest

from sana_jax.runtime import hosts
from sana_jax.runtime.checks import BadArgument
from sana_jax.runtime.errors import Retry, UserError


def fail(error):
    raise error


def test_one_host_is_alone():
    assert hosts.gather_values({"a": (1, b"2")}) == [{"a": (1, b"2")}]
    assert hosts.raise_together(max, 1, 2) == hosts.on_first_host(max, 1, 2) == 2
    error = UserError("no such folder")
    for call in hosts.raise_together, hosts.on_first_host:
        with pytest.raises(UserError) as caught:
            call(fail, error)
        assert caught.value is error and error.__cause__ is None


GLOO = "UNKNOWN: Gloo all-reduce failed: [external/gloo/pair.cc:547] Connection closed by peer"


@pytest.mark.parametrize(
    "error, lost",
    [
        (ValueError(GLOO), True),  # where a small program is dispatched
        (ValueError("INTERNAL: gloo context initialization failed: timeout"), True),
        (jax.errors.JaxRuntimeError(GLOO), True),
        (jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: a bug"), False),
        (ValueError("NOT_FOUND: Error opening zarr"), False),
        (UserError("data.source=gloo is no folder"), False),
        (None, False),
    ],
)
def test_errors_by_which_a_lost_host_is_known(monkeypatch, error, lost):
    assert not hosts.is_loss(error)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert hosts.is_loss(error) is lost


def test_a_lost_host_is_known_by_an_error_s_cause(monkeypatch):
    """As where Orbax waits for all hosts at the end of a save."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    error = TimeoutError("Timed out while waiting for async_write_complete barrier.")
    assert not hosts.is_loss(error)
    error.__cause__ = jax.errors.JaxRuntimeError("INTERNAL: Barrier failed because: task is set")
    assert hosts.is_loss(error)


def test_a_lost_host_is_not_asked_for_its_error(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "gather_values", lambda mine: pytest.fail("it would never answer"))
    with pytest.raises(ValueError, match="Gloo"):
        hosts.raise_together(fail, ValueError(GLOO))


def test_what_others_raise(monkeypatch):
    """On the second of three hosts; the first that failed decides."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    told = [None, None, (Retry, "the disk is away")]
    monkeypatch.setattr(hosts, "gather_values", lambda mine: [told[0], mine, told[2]])
    with pytest.raises(Retry, match="^the disk is away$"):
        hosts.raise_together(max, 1, 2)
    with pytest.raises(UserError, match="mine"):
        hosts.raise_together(fail, UserError("mine"))
    told[0] = UserError, "the first's"
    with pytest.raises(UserError, match="^the first's$"):
        hosts.raise_together(fail, Retry("mine"))
    with pytest.raises(UserError, match="^the first's$"):
        hosts.on_first_host(lambda: pytest.fail("only the first acts"))


def test_an_error_of_several_arguments_reaches_the_others(monkeypatch):
    sent = []
    monkeypatch.setattr(hosts, "gather_values", lambda mine: sent.append(mine) or [mine])
    error = BadArgument("seed", "-1 is too small")
    with pytest.raises(BadArgument):
        hosts.raise_together(fail, error)
    (kind, message) = sent[0]
    with pytest.raises(UserError, match="^seed -1 is too small$"):
        raise kind(message)
