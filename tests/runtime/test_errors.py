"""Errors that carry a remedy: who catches them, and that they travel between hosts."""

import jax
import pytest

from sana_jax.runtime import hosts
from sana_jax.runtime.errors import DoNotRetry, Retry, Stopped, UserError, refused

KINDS = UserError, Retry, Stopped, DoNotRetry


def test_a_user_error_is_a_value_error_and_a_stop_may_be_retried():
    assert issubclass(UserError, ValueError) and issubclass(Stopped, Retry)
    assert not any(issubclass(kind, ValueError) for kind in (Retry, DoNotRetry))
    assert not issubclass(DoNotRetry, Retry) and not issubclass(Retry, Stopped)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_another_host_is_the_same_error_here(monkeypatch, kind):
    """Its kind and its message travel, so the message is all that it needs."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(hosts, "gather_values", lambda mine: [(kind, "why; do this"), mine])
    with pytest.raises(kind, match="^why; do this$") as caught:
        hosts.raise_together(max, 1, 2)
    assert type(caught.value) is kind


@pytest.mark.parametrize("kind", [*KINDS, KeyboardInterrupt, SystemExit])
def test_what_has_a_status_of_its_own_is_not_refused(kind):
    with pytest.raises(kind, match="^why$"), refused("the file"):
        raise kind("why")


@pytest.mark.parametrize("base", [Exception, BaseException])
def test_another_librarys_error_is_one_line(base):
    for message, line in ("one\ntwo", "one"), (" ", "PanicException(' ')"):
        with pytest.raises(UserError) as caught, refused("the file"):
            raise type("PanicException", (base,), {})(message)
        assert str(caught.value) == f"the file: {line}"


def test_a_message_that_quotes_a_whole_file_loses_its_middle():
    short, long = UserError("a file is bad"), UserError("a.json: " + "x" * 10**6 + " is bad")
    assert str(short) == "a file is bad" and UserError(KeyError("a")).args == ("'a'",)
    assert len(str(long)) < 2100 and str(long).startswith("a.json: x")
    assert str(long).endswith("x is bad")
