"""Errors that the user or the scheduler can act on; runtime/cli.py turns them into exit statuses.

The message is one line that names the thing and the remedy. Any other exception is a bug of ours.
"""

import contextlib
from collections.abc import Iterator

EXIT_USER_ERROR, EXIT_RETRY, EXIT_DO_NOT_RETRY = 2, 75, 76
LONGEST = 2000  # letters of a message: what it quotes may be megabytes of a damaged file


class UserError(ValueError):
    """The user's input cannot be used (status 2). A message that is too long loses its middle."""

    def __init__(self, message: object = ""):
        text = str(message)
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
        super().__init__(text)


class Retry(Exception):
    """The same command may succeed later: preempted, hung, a host lost, storage away (75)."""


class Stopped(Retry):
    """A signal ended the command and its state is saved: nothing is wrong (75)."""


class DoNotRetry(Exception):
    """The command stopped itself and would again; the message names the last good step (76)."""


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Turns every error of another library's code into a UserError, "WHAT: its first line".

    A panic of native code is a BaseException, so that no `except Exception` would see it.
    """
    try:
        yield
    except (UserError, Retry, DoNotRetry):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # a signal
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{what}: {reason}") from error
