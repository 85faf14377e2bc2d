"""Progress of long work: a bar on a terminal, lines in the log of a job."""

import contextlib
import sys
import time
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 60.0


class Progress(tqdm):
    """tqdm's bar, or a line a minute where stderr is no terminal."""

    def __init__(self, total: int, unit: str, desc: str = "", **options: Any):
        """`unit` is the singular noun for what is counted."""
        super().__init__(total=total, unit=f" {unit}", desc=desc, disable=None, **options)
        self._line = f"{desc}{': ' * bool(desc)}{{}} of {{}} {unit}s"
        self._due = time.monotonic() + LINE_SECONDS
        self._note = ""

    def tell(self, note: str) -> None:
        """Shows a note behind the numbers from now on, such as what it has cost so far."""
        self._note = note
        if not self.disable:
            self.set_postfix_str(note, refresh=False)

    def update(self, n: int = 1) -> None:
        super().update(n)
        if not self.disable:
            return
        self.n += n  # which tqdm leaves to a bar that is shown
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + LINE_SECONDS
            with contextlib.suppress(OSError):  # who listened may have gone
                line = self._line.format(self.n, self.total) + f", {self._note}" * bool(self._note)
                print(line, file=sys.stderr, flush=True)
