"""A vision-language model behind an OpenAI-compatible endpoint, asked until it answers.

A question is one POST to URL/chat/completions. It is put again, after a pause that doubles, where
the connection fails or is cut, where nothing comes in time, where the answer is no whole JSON, and
for the statuses of RETRIED and from 500 on. A `Retry-After` header holds all threads for as long as
it says. No other status is tried again, and no redirection is followed, which could carry the key
to another host. What the endpoint says is quoted without the key.
"""

import contextlib
import dataclasses
import email.utils
import itertools
import logging
import random
import threading
import time
from typing import Any

import httpx2

from sana_jax.runtime.errors import Retry, UserError
from sana_jax.runtime.files import parse_json

PATH = "/chat/completions"
RETRIED = 408, 409, 425, 429
LONGEST_PAUSE = 60.0  # seconds, between two tries
LONGEST_HOLD = 3600.0  # that a Retry-After is taken for
QUOTED = 200  # letters of what an endpoint says


class Refused(Exception):
    """The model does not describe this picture; the message says why."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's text, and the tokens that it counts: those that it read and those it wrote."""

    text: str
    read: int = 0
    written: int = 0


class Pace:
    """Lets threads pass one by one, `per_minute` at most, and none while it is held.

    `wait` and `sleep` raise Retry once `stop` is called.
    """

    def __init__(self, per_minute: float | None = None):
        self._gap = 60 / per_minute if per_minute else 0.0
        self._next = 0.0  # when the next thread may pass
        self._lock, self._stopped = threading.Lock(), threading.Event()

    def wait(self) -> None:
        """Returns when this thread may pass."""
        while True:
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + self._gap
                    break
                left = self._next - now
            self.sleep(left)
        self.sleep(0)

    def hold(self, seconds: float) -> None:
        """Lets no thread pass for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise Retry("it was stopped")

    def stop(self) -> None:
        self._stopped.set()


class Endpoint:
    """Questions to the models of one address; any number of threads may ask.

    Args:
      url: of the interface, such as https://api.openai.com/v1; a query is kept.
      key: sent as a bearer token; None: none.
      key_name: what the user calls the key.
      per_minute: tries at most; None: no limit.
      timeout: seconds without a byte.
      attempts: tries for one question.
      pause: seconds between the first two.

    Attributes:
      retries: tries that were not the first.

    Raises UserError for an address or a key that cannot be used, without quoting either's secrets.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        key_name: str = "the key",
        per_minute: float | None = None,
        timeout: float = 120.0,
        attempts: int = 10,
        pause: float = 1.0,
    ):
        self._key, self._key_name = key, key_name
        self._url, self.retries = _url(url), 0
        self._pace, self._attempts, self._pause = Pace(per_minute), attempts, pause
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise UserError(f"{key_name} is no key: it has spaces, or letters that no header takes")
        for library in "httpx2", "httpcore2":  # which log addresses, and what was answered
            logging.getLogger(library).setLevel(logging.WARNING)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._client = httpx2.Client(
            headers=headers, timeout=timeout, limits=httpx2.Limits(max_connections=None)
        )

    def ask(self, question: dict[str, Any]) -> Answer:
        """Returns the answer to a question of the chat interface.

        Raises Refused if the model does not answer this one, UserError if the endpoint takes no
        question like it, and Retry if it does not answer in all tries.
        """
        for attempt in itertools.count(1):
            self._pace.wait()
            held = None
            try:
                response = self._client.post(self._url, json=question)
                if response.status_code == 200:
                    return _answer(response.content)
                if response.status_code not in RETRIED and response.status_code < 500:
                    raise self._refusal(response)
                why, held = f"status {response.status_code}", _retry_after(response.headers)
            except httpx2.RequestError as error:
                why = self._quoted(f"{type(error).__name__}: {error}")
            except ValueError as error:
                if isinstance(error, UserError):
                    raise
                why = f"an answer that is none: {error}"
            if attempt == self._attempts:
                raise Retry(
                    f"{self} does not answer in {attempt} tries, last {why}; the same command goes"
                    " on from here"
                )
            self.retries += 1
            if not held:  # or a date that has passed, by the clock here
                longest = min(LONGEST_PAUSE, self._pause * 2 ** (attempt - 1))
                self._pace.sleep(longest * random.uniform(0.5, 1))
            else:
                self._pace.hold(held)
        raise AssertionError("the last attempt returns or raises")

    def _refusal(self, response: httpx2.Response) -> Exception:
        status = f"status {response.status_code}"
        if response.status_code in (401, 403):  # what it says may hold a part of the key
            given = f"the key in {self._key_name}" if self._key else f"no key: set {self._key_name}"
            return UserError(f"{self} does not accept {given} ({status})")
        if response.is_redirect:
            return UserError(f"{self} leads elsewhere ({status}); give the address that it means")
        said = self._quoted(response.text)
        if response.status_code == 402:
            return UserError(f"{self} wants to be paid first ({status}): {said}")
        if response.status_code in (404, 405):
            return UserError(f"{self} has no such model or interface ({status}): {said}")
        return Refused(f"{status}: {said}")

    def _quoted(self, text: str) -> str:
        text = " ".join(text.split())
        return (text.replace(self._key, "[key]") if self._key else text)[:QUOTED]

    def __str__(self) -> str:
        return str(self._url.copy_with(query=None))

    def close(self) -> None:
        """Ends the pauses of other threads; what they have asked is lost."""
        self._pace.stop()
        self._client.close()


def _url(given: str) -> httpx2.URL:
    shape = "give one such as https://api.openai.com/v1 or http://localhost:8000/v1"
    try:
        url = httpx2.URL(given)
    except (httpx2.InvalidURL, ValueError):
        raise UserError(f"--endpoint is no address: {shape}") from None
    if url.userinfo:
        raise UserError("--endpoint holds a name or a password; a key goes into the environment")
    is_web = url.scheme in ("http", "https") and url.host and (url.port or 0) < 2**16
    if not is_web:
        raise UserError(f"--endpoint={given:.80} is no address of the web: {shape}")
    path = url.path.rstrip("/")
    return url if path.endswith(PATH) else url.copy_with(path=path + PATH)


def _answer(content: bytes) -> Answer:
    """Returns the text of a chat's answer. Raises ValueError for what is none, and Refused."""
    values = parse_json(content)
    try:
        choice = values["choices"][0]
        message, ended = choice["message"], choice.get("finish_reason")
        text, refusal = message["content"], message.get("refusal")
        if isinstance(text, list):  # of parts
            text = "".join(part["text"] for part in text if part.get("type") == "text")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("it has no choices[0].message.content") from None
    if refusal or ended == "content_filter":
        raise Refused("the model refuses")
    if ended == "length":
        raise Refused("its answer is longer than --max_tokens")
    if text is not None and not isinstance(text, str):
        raise ValueError("its content is no text")
    if not (text := " ".join((text or "").split())):
        raise Refused("its answer is empty")
    usage = values.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    counts = (usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
    return Answer(text, *(n if type(n) is int and n > 0 else 0 for n in counts))


def _retry_after(headers: httpx2.Headers) -> float | None:
    """Returns the seconds that a Retry-After header asks for, also as a date; None without."""
    given, seconds = headers.get("retry-after"), None
    if given is None:
        return None
    with contextlib.suppress(ValueError):
        seconds = float(given)
    if seconds is None:
        try:
            seconds = email.utils.parsedate_to_datetime(given).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), LONGEST_HOLD) if seconds == seconds else None
