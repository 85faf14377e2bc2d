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
