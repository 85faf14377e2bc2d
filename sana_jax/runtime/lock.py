"""Lets one process at a time write to a folder, by a lock file.

A mounted object store has no locks: there two machines may write, and neither is refused.
"""

import contextlib
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from functools import partial

from etils import epath

from sana_jax.runtime.errors import Retry, UserError

NAME = ".sana_jax.lock"
START = b"sana_jax: pid "
OURS = re.compile(rb"sana_jax: (pid \d+, .+)", re.DOTALL)


@contextlib.contextmanager
def locked(folder: epath.Path, flag: str = "--out") -> Iterator[Callable[[], None]]:
    """Locks a folder for the block. The system releases the lock of a process that dies.

    `flag` names the folder on the command line. Raises UserError if another process holds the lock,
    or a file of the lock's name is not this program's, and OSError.

    The block gets a function that checks whether the folder of that name is still the locked one.
    It raises UserError if the folder was renamed, Retry if it is gone or replaced, and OSError.
    """
    try:
        import fcntl
    except ImportError:  # not a Unix
        yield lambda: None
        return
    path, has_locks = folder / NAME, True
    with contextlib.ExitStack() as stack:
        while True:
            file = _open(path)
            stack.callback(os.close, file)
            owner = _owner(path, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another run ({owner}) writes to {flag}={folder}") from None
            except OSError:
                has_locks = False  # a file system without them
            # The run before may have removed the file between our opening and our locking it.
            if _is_at(path, file):
                break
        _owner(path, file)  # what was written before we held the lock
        try:
            with contextlib.suppress(OSError):  # a full disk: it is locked, though without a name
                os.ftruncate(file, 0)
                os.pwrite(file, f"sana_jax: pid {os.getpid()}, {socket.gethostname()}".encode(), 0)
            yield partial(_check, path, file, flag) if has_locks else lambda: None
        finally:
            with contextlib.suppress(OSError):  # a mount that went away: what ended us says more
                if _is_at(path, file):
                    os.unlink(path)


def _check(path: epath.Path, file: int, flag: str) -> None:
    if _is_at(path, file):
        return
    with contextlib.suppress(OSError):  # only Linux tells where an open file is
        now = epath.Path(os.readlink(f"/proc/self/fd/{file}"))
        if _is_at(now, file):
            raise UserError(
                f"{flag}={path.parent} was renamed to {now.parent} while this run wrote to it:"
                " give it the new name"
            )
    raise Retry(f"{flag}={path.parent} is gone, or another folder than this run locked")


def _open(path: epath.Path) -> int:
    if os.path.islink(path):
        raise _foreign(path)
    # O_NONBLOCK: or a pipe of that name would keep us waiting.
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _owner(path: epath.Path, file: int) -> str:
    """Returns who wrote the file. Raises UserError if another program did."""
    if not stat.S_ISREG(os.fstat(file).st_mode):
        raise _foreign(path)
    # A power cut may leave the beginning of our line, or NULs in its place.
    content = os.pread(file, 1000, 0).rstrip(b"\0")
    found = OURS.fullmatch(content)
    if not found and not _is_torn(content):
        raise _foreign(path)
    return found[1].decode(errors="replace") if found else "just started"


def _is_torn(content: bytes) -> bool:
    """Returns True for the beginning of this program's line, the empty one included."""
    return START.startswith(content) or re.fullmatch(START + rb"\d+,? ?", content) is not None


def _foreign(path: epath.Path) -> UserError:
    return UserError(f"{path} is not of this program, which needs the name; move it away")


def _is_at(path: epath.Path, file: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), os.lstat(path))
    return False
