"""Errors that the user or the scheduler can act on; runtime/cli.py turns them into exit statuses.

The message is one line that names the thing and the remedy. Any other exception is a bug of ours.
"""


class UserError(ValueError):
    """The user's input cannot be used (status 2)."""


class Retry(Exception):
    """The same command may succeed later: preempted, hung, a host lost, storage away (75)."""


class Stopped(Retry):
    """A signal ended the command and its state is saved: nothing is wrong (75)."""


class DoNotRetry(Exception):
    """The command stopped itself and would again; the message names the last good step (76)."""
