"""A judge that is a command: it reads pictures and prompts, and prints what it thinks of them.

On its standard input are lines of a picture's path, a tab and its prompt (line ends and tabs in it
are spaces). For every line, in their order, it prints one: a number, of which more is better; or
for a tournament "yes" or "no" and the logarithms of the probabilities of both: "yes -0.2 -1.7". It
is started once, and what it has printed is kept where it is stopped.
"""

import math
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import reason_of


class WrongCount(UserError):
    """It printed more or fewer lines than it read: none can be trusted to be of its picture."""


def check(command: str) -> list[str]:
    """Returns the words of a command. Raises UserError if its program is not there."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"--judge={command}: {error}") from None
    if not words or shutil.which(words[0]) is None:
        raise UserError(
            f"--judge={command}: there is no program {words[0] if words else ''!r}; give clip, or a"
            " command that reads PATH<tab>PROMPT lines and prints a score for each"
        )
    return words


def judged(command: str, pictures: Sequence[tuple[str, str]], says: bool) -> Iterator[Any]:
    """Yields the command's answer for each (path, prompt) as soon as it is printed.

    `says`: answers are [yes or no, log of yes, log of no], else numbers. Raises UserError if it
    fails, or prints anything else, and WrongCount.
    """
    with tempfile.TemporaryFile() as given:
        for path, prompt in pictures:
            given.write(f"{path}\t{' '.join(prompt.split())}\n".encode("utf-8", "replace"))
        given.seek(0)
        try:
            started = subprocess.Popen(check(command), stdin=given, stdout=subprocess.PIPE)
        except OSError as error:
            raise UserError(f"--judge={command}: {reason_of(error)}") from None
        with started as process:
            try:
                yield from _read(command, process, pictures, says)
            finally:
                process.kill()  # it may go on, where this program does not


def _read(command, process, pictures, says) -> Iterator[Any]:
    number = 0
    for line in process.stdout:
        text = line.decode("utf-8", "replace").strip()
        if not text:
            continue
        if number == len(pictures):
            said = f"it prints more than {number} lines: {text!r:.60}"
            raise WrongCount(f"--judge={command}: {said}")
        answer = _parsed(text, says)
        if answer is None:
            wanted = "yes or no and two logarithms" if says else "a number"
            raise UserError(
                f"--judge={command}: of {pictures[number][0]} it prints {text!r:.60}, not {wanted}"
            )
        number += 1
        yield answer
    status = process.wait()
    if status:
        raise UserError(
            f"--judge={command}: it ended with status {status} after {number} of {len(pictures)}"
            " pictures; the same command goes on there"
        )
    if number < len(pictures):
        raise WrongCount(
            f"--judge={command}: it printed {number} lines for {len(pictures)} pictures"
        )


def _parsed(text: str, says: bool) -> Any:
    """Returns the answer in a line, or None."""
    said, *words = text.lower().split() if says else ("", text)
    if says and (said not in ("yes", "no") or len(words) != 2):
        return None
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        return None
    if not all(map(math.isfinite, numbers)):
        return None
    return [said, *numbers] if says else numbers[0]
