"""Standard output and error that no closed pipe and no letter breaks."""

import errno
import io
import os
import sys

from sana_jax.runtime.errors import Retry, UserError


def guard() -> None:
    """Lets Python print whatever happens; call it before libraries take hold of the streams.

    Letters that the encoding lacks are printed as escapes. What nobody reads any more, as after
    `| head`, is dropped, and so is what standard error does not take. Where a file does not take
    standard output, printing raises Retry if the disk is full, else UserError.
    """
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # it was closed: a data file would get its number, and what libraries print
    os.close(null)
    for number, name in (1, "stdout"), (2, "stderr"):
        old = getattr(sys, name)
        if old is not getattr(sys, f"__{name}__"):
            continue  # someone else captures it
        raw = _Descriptor(number, "wb", closefd=False)
        through = old is not None and old.write_through  # python -u
        stream = io.TextIOWrapper(
            raw if through else io.BufferedWriter(raw),  # type: ignore[type-var]
            encoding=old.encoding if old else "utf-8",
            errors="backslashreplace",
            line_buffering=old is not None and old.line_buffering,
            write_through=through,
        )
        if old:
            old.flush()
        setattr(sys, name, stream)


class _Descriptor(io.FileIO):
    def write(self, data, /):
        try:
            return super().write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # or the same would happen again at the end
            os.close(null)
            is_gone = error.errno in (errno.EPIPE, errno.EIO)  # EIO: a terminal that was closed
            if is_gone or self.fileno() == 2:
                return memoryview(data).nbytes
            kind = Retry if error.errno in (errno.ENOSPC, errno.EDQUOT) else UserError
            raise kind(f"standard output: {error.strerror}") from error
