"""One question to an endpoint on loopback that misbehaves."""

import email.utils
import json
import logging
import threading
import time

import httpx2
import pytest

from sana_jax.data.labelling import endpoint as module
from sana_jax.data.labelling.describe import Questions, as_address
from sana_jax.data.labelling.endpoint import Answer, Endpoint, Pace, Refused
from sana_jax.runtime.errors import Retry, UserError
from tests.data.bad_files import encode, picture
from tests.data.labelling.server import KEY, Server, caption

PICTURE = as_address(encode(picture(), "PNG"), 16)
QUESTION = Questions(("vlm",), "Describe.").question("vlm", 0, PICTURE)
ANSWER = " ".join(caption(QUESTION).split())


@pytest.fixture
def ask():
    def asked(server, **options):
        options = dict(pause=0.001, timeout=5.0, attempts=8) | options
        found = Endpoint(server.address, KEY, key_name="$KEY", **options)
        try:
            return found.ask(QUESTION)
        finally:
            found.close()

    return asked


FAULTS = ["slow", (429,), (503, [("Retry-After", "0")]), "broken", "web page", "cut", "hang up"]


@pytest.mark.parametrize("fault", [*FAULTS, lambda _: {"error": "busy"}, lambda _: [1]])
def test_what_is_asked_again(ask, fault):
    with Server(fault) as server:
        assert ask(server) == Answer(ANSWER, 900, 11)
        assert list(server.tries.values()) == [1 if fault == "slow" else 2]
        assert server.keys == {f"Bearer {KEY}"}


def test_an_answer_that_takes_too_long_is_asked_for_again(ask):
    with Server("slow") as server:
        assert ask(server, timeout=0.1).text == ANSWER
        (tries,) = server.tries.values()
        assert tries >= 2  # more where this machine is slow itself


def test_the_last_try_says_why_without_the_key(ask):
    with Server(*[(500,)] * 9) as server, pytest.raises(Retry) as error:
        ask(server, attempts=3)
    assert "does not answer in 3 tries, last status 500; the same" in str(error.value)
    with pytest.raises(Retry, match="in 2 tries, last ConnectError"):  # it is closed now
        ask(server, attempts=2)
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "fault, kind, words",
    [
        ((401,), UserError, r"does not accept the key in \$KEY \(status 401\)$"),
        ((402,), UserError, r"wants to be paid first \(status 402\): .*Bearer \[key\]"),
        ((404,), UserError, r"no such model or interface \(status 404\): .*Bearer \[key\]"),
        ((302, [("Location", "http://127.0.0.1:1/")]), UserError, "leads elsewhere"),
        ((400,), Refused, r"^status 400: .*you gave Bearer \[key\]"),
    ],
)
def test_what_is_not_asked_again(ask, fault, kind, words):
    with Server(fault) as server:
        with pytest.raises(kind, match=words) as error:
            ask(server)
        assert list(server.tries.values()) == [1]
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(finish_reason="content_filter"), "the model refuses"),
        (dict(message={"content": None, "refusal": "no"}), "the model refuses"),
        (dict(finish_reason="length"), "longer than --max_tokens"),
        (dict(message={"content": " \n"}), "its answer is empty"),
    ],
)
def test_answers_that_describe_nothing(ask, changes, words):
    def fault(whole):
        return {"choices": [whole["choices"][0] | changes]}

    with Server(fault) as server, pytest.raises(Refused, match=words):
        ask(server)


def test_an_answer_in_parts_and_without_a_count(ask):
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "cat"}, {"type": "audio"}]
    with Server(lambda _: {"choices": [{"message": {"content": parts}}], "usage": [1]}) as server:
        assert ask(server) == Answer("a cat", 0, 0)


def test_a_retry_after_holds_all_threads():
    with Server((429, [("Retry-After", "0.5")])) as server:
        found = Endpoint(server.address, pause=0.001)
        first = threading.Thread(target=found.ask, args=[QUESTION])
        first.start()
        while not server.times:
            time.sleep(0.01)
        time.sleep(0.1)
        found.ask(QUESTION | {"seed": 7, "model": "other"})
        first.join()
        found.close()
        assert len(server.times) == 4 and found.retries == 2
        assert min(server.times[1:]) - server.times[0] >= 0.5
        assert server.keys == {None}


def test_a_retry_after_that_has_passed_is_no_reason_to_hurry(ask):
    past = (503, [("Retry-After", email.utils.formatdate(0, usegmt=True))])
    with Server(past, past) as server:
        ask(server, pause=0.1)
    assert server.times[2] - server.times[0] >= 0.15  # half of 0.1 and of 0.2 at least


def test_retry_after_as_a_date_and_as_nonsense():
    def seconds(text):
        return module._retry_after(httpx2.Headers({"Retry-After": text}))

    then = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 28 < seconds(then) <= 30
    assert (seconds("2.5"), seconds("-3"), seconds("inf")) == (2.5, 0, module.LONGEST_HOLD)
    assert seconds("soon") is None and seconds("nan") is None
    assert module._retry_after(httpx2.Headers()) is None


def test_the_pace_of_threads():
    pace, passed = Pace(per_minute=600), []

    def run():
        pace.wait()
        passed.append(time.monotonic())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gaps = [b - a for a, b in zip(sorted(passed), sorted(passed)[1:], strict=False)]
    assert min(gaps) > 0.09
    pace.hold(60)
    threading.Timer(0.1, pace.stop).start()
    with pytest.raises(Retry):
        pace.wait()


@pytest.mark.parametrize(
    "url, words",
    [
        ("localhost:8000", "is no address of the web"),
        ("ftp://host/v1", "is no address of the web"),
        ("http://", "is no address of the web"),
        ("http://host:99999/v1", "is no address of the web"),
        ("http://[::", "is no address"),
        ("https://me:secret@host/v1", "holds a name or a password"),
    ],
)
def test_addresses_that_are_none(url, words):
    with pytest.raises(UserError, match=words) as error:
        Endpoint(url)
    assert "secret" not in str(error.value)


def test_addresses_are_not_logged(caplog):
    caplog.set_level(logging.DEBUG)
    with Server() as server:
        found = Endpoint(f"{server.address}?token=secret", KEY)
        assert found.ask(QUESTION).text == ANSWER and "secret" not in str(found)
        found.close()
    assert "secret" not in caplog.text and KEY not in caplog.text


def test_the_address_of_the_interface():
    for given in "https://h/v1", "https://h/v1/", "https://h/v1/chat/completions":
        assert str(Endpoint(given)) == "https://h/v1/chat/completions"
    with_query = Endpoint("https://h/v1?api-version=7")
    assert str(with_query._url) == "https://h/v1/chat/completions?api-version=7"


@pytest.mark.parametrize("key", ["a b", "a\nb", "ключ"])
def test_a_key_that_no_header_takes_is_not_quoted(key):
    with pytest.raises(UserError, match=r"\$KEY is no key") as error:
        Endpoint("https://h/v1", key, key_name="$KEY")
    assert key not in str(error.value)


def test_the_question_is_the_interfaces():
    with Server() as server:
        found = Endpoint(server.address)
        found.ask(QUESTION)
        found.close()
    sent = json.loads(json.dumps(server.bodies[0]))
    assert sent["messages"][0]["content"][1]["image_url"]["url"].startswith("data:image/jpeg;")
    kept = {name: sent[name] for name in ("model", "max_tokens", "temperature", "seed")}
    assert kept == {"model": "vlm", "max_tokens": 300, "temperature": 0.7, "seed": 0}
