"""What is raised for the user or the scheduler to act on; commands make exit statuses of it.

The message is one line that names the thing and the remedy. Everything else that is raised is a
bug of ours.
"""


class UserError(ValueError):
    """What the user gave cannot be used (status 2)."""


class Retry(Exception):
    """The same command may succeed later: preempted, hung, a peer lost, storage away (75)."""


class Stopped(Retry):
    """A signal ended the command, and what it had is saved: nothing is wrong (75)."""


class DoNotRetry(Exception):
    """The command stopped itself and would stop again; names the last good step (76)."""
