"""The error that is the user's to mend."""


class UserError(ValueError):
    """What the user gave cannot be used; the message is one line that names it and the remedy.

    Commands print it and exit with status 2; everything else that is raised is a bug of ours.
    """
