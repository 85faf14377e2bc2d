"""Local and remote paths, and files and folders that exist completely or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from sana_jax.runtime import lock
from sana_jax.runtime.errors import Retry, UserError


def is_local(path: str | os.PathLike) -> bool:
    """Returns True if `path` is on a disk, which can rename, append and lock."""
    return not re.match(r"\w+:/", os.fspath(path))  # pathlib leaves one slash of gs://bucket


def named(path: Any) -> str:
    """Returns what a user calls a file or a folder, `~` replaced. Raises UserError for no name.

    Nor may it hold bytes that are not UTF-8: the libraries that open our files refuse such names.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"{path!r:.60} is no path: give a text")
    name = os.path.expanduser(os.fspath(path))
    if not name:
        raise UserError("a path is empty: name a file or a folder")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name!r:.60} is a name that is not UTF-8, which cannot be used") from None
    if "\0" in name:
        raise UserError(f"{name!r:.60} cannot be the name of a file: it has a null character")
    return name


def local(folder: str | os.PathLike) -> Path:
    """Returns the folder that a user names. Raises UserError for an address such as gs://bucket."""
    name = named(folder)
    if not is_local(name):
        raise UserError(f"{name}: this is written to local folders only; copy it from there")
    return Path(name)


def absolute(path: str | os.PathLike) -> epath.Path:
    """Returns a local path as an absolute one, links and `..` kept; an address as it is.

    Raises the errors of `named`.
    """
    name = named(path)
    return epath.Path(os.path.abspath(name) if is_local(name) else name)


# What opening a path raises; ImportError where what reads such addresses is not installed.
UNREACHABLE = OSError, ImportError


def reason_of(error: Exception) -> str:
    """Returns the reason why a path could not be read or written, without the path."""
    return str(getattr(error, "strerror", None) or error)


def is_full(error: OSError) -> bool:
    """Returns True if a disk or a quota was full: the same may succeed later."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def unwritten(what: str, error: OSError) -> Exception:
    """Returns the error for an unwritten file: Retry if the disk is full, else UserError."""
    return (Retry if is_full(error) else UserError)(f"{what}: {reason_of(error)}")


@contextlib.contextmanager
def storage(path: os.PathLike | None) -> Iterator[None]:
    """Turns every OSError from writing to `path` into Retry.

    A training must not be given up because of a disk.
    """
    try:
        yield
    except OSError as error:
        raise Retry(f"{path}: {reason_of(error)}") from error


def check_is_file(path: str | os.PathLike, name: str) -> None:
    """Raises UserError, which begins with `name`, if what is there is no file, nor a link to one.

    A pipe would be read for ever. Nothing there, and an address, pass. Raises OSError.
    """
    if not is_local(path) or not os.path.lexists(path) or os.path.isfile(path):
        return
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    mode = os.stat(path).st_mode if os.path.exists(path) else 0
    kind = next((kind for test, kind in kinds.items() if test(mode)), "a device")
    what = kind if mode else "a link that leads to nothing"
    raise UserError(f"{name} is {what}, where a file is needed")


def check_is_folder(path: str | os.PathLike) -> None:
    """Raises UserError if what is there is no folder, nor a link to one. Nothing there passes."""
    if os.path.lexists(path) and not os.path.isdir(path):
        what = "a file" if os.path.exists(path) else "a link that leads to nothing"
        raise UserError(f"{path} is {what}, where a folder is needed; move it away")


def require_folder(path: epath.Path, name: str, advice: str) -> None:
    """Raises UserError unless a folder is there; it is called `name`. Raises OSError."""
    if not path.is_dir():
        what = "is no folder" if path.exists() else "there is no such folder"
        raise UserError(f"{name}: {what}; {advice}")


def check_readable(path: os.PathLike) -> None:
    """Raises Retry if a file that existed before cannot be read: its storage is away."""
    try:
        with epath.Path(path).open("rb") as file:
            file.read(1)
    except OSError as error:
        raise Retry(f"{path} cannot be read: {reason_of(error)}") from error


def write_atomically(path: epath.Path, content: bytes, part: str = ".part") -> None:
    """Writes a file completely or not at all; the old one stays until then. Raises OSError.

    The content goes to a file named `path` + `part` first. Processes that write the same file must
    not share `part`.
    """
    if not is_local(path):
        path.write_bytes(content)  # an object store shows no half of it
        return
    partial = path.with_name(path.name + part)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave the new name of an empty file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder, which replaces `folder` when the block ends.

    The old folder stays until then, and also if the block raises. A rename that fails leaves the
    new one as NAME.part. Raises OSError, and UserError for a file in the place of either.
    """
    partial = folder.with_name(folder.name + ".part")
    check_is_folder(folder)
    check_is_folder(partial)
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for path in filter(Path.is_file, partial.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut may leave the new name of empty files
    if folder.is_symlink():
        folder.unlink()  # what it leads to stays
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


# The first bytes of a file that stands for another one -> what it is, and the remedy.
STAND_INS = {
    b"version https://git-lfs": "a git-LFS pointer, not the file itself: run `git lfs pull`",
    **dict.fromkeys(
        (b"<!doctype", b"<html", b"<?xml"), "a web page, not the file itself: download it again"
    ),
}


def check_itself(path: Path) -> None:
    """Raises UserError if a file holds what a failed download leaves in its place."""
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    for start, what in STAND_INS.items():
        if head.startswith(start):
            raise UserError(f"{path} is {what}")


# The index of the largest checkpoints has 10 MB. Python's objects are up to 40 times as large.
MAX_JSON = 2**24  # bytes
MAX_DEPTH = 100  # of lists and objects in one another: what reads them may be recursive


def parse_json(text: str | bytes, depth: int = MAX_DEPTH) -> Any:
    """Returns what a JSON text holds. Raises ValueError, whatever the text is.

    Lists and objects may lie in one another up to `depth` deep.
    """
    try:
        contents = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if nests(contents, depth):
        raise ValueError("it is nested too deeply")
    return contents


def nests(value: Any, depth: int) -> bool:
    """Returns True if lists and objects of JSON lie in one another more than `depth` deep."""
    if not isinstance(value, dict | list):
        return False
    values = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(nests(each, depth - 1) for each in values)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises UserError."""
    try:
        check_is_file(path, str(path))
        with path.open("rb") as file:
            text = file.read(MAX_JSON + 1)
        if len(text) > MAX_JSON:
            raise UserError(f"{path} has more than {MAX_JSON} bytes: it is another file")
        contents = parse_json(text.decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason_of(error)}") from None
    except UserError:
        raise
    except ValueError as error:
        check_itself(path)
        raise UserError(f"{path} is not JSON ({error})") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds no JSON object")
    return contents


def named_file(document: Path, name: Any) -> Path:
    """Returns the path of a file that a document names, in the document's own folder.

    Raises UserError if it is missing or lies elsewhere. A link, as in the hub's cache, is fine.
    """
    if not isinstance(name, str) or not name.isprintable():
        raise UserError(f"{document} names a file {name!r}, which is no file's name")
    path = document.parent / name
    if Path(name).is_absolute() or ".." in Path(name).parts or path == document.parent:
        raise UserError(f"{document} names a file outside its folder: {name}")
    try:
        if path.is_file():
            return path
    except OSError as error:  # a name that is too long
        raise UserError(f"{document} names {path}: {reason_of(error)}") from None
    raise UserError(f"{path} is missing, which {document.name} names")


def sha256_of(path: Path) -> str:
    """Returns the sha256 of a file, read to its end."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_new(out: str) -> Path:
    """Returns the path of --out. Raises UserError unless it is missing or an empty folder."""
    if not out:
        raise UserError("--out is empty: name a folder")
    path = Path(named(out))
    try:
        _refuse_used(path, f"--out={out}")
    except OSError as error:
        raise UserError(f"--out={out:.60}: {error.strerror}") from None
    return path


def _refuse_used(path: Path, name: str) -> None:
    if path.exists() and not (path.is_dir() and all(p.name == lock.NAME for p in path.iterdir())):
        raise UserError(f"{name} exists and is not an empty folder")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Makes a folder for the block to fill; if the block raises, the folder is as it was before.

    Raises UserError if the folder is not empty or another process writes to it. Errors of the disk
    become UserErrors, or Retry if it is full.
    """
    made = []
    try:
        if not path.is_dir():  # of a folder its lock says more
            _refuse_used(path, str(path))
        made = [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=True)
        with lock.locked(path):
            _refuse_used(path, str(path))  # another may have been faster
            with _emptied_on_errors(path):
                yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            for new in made:
                new.rmdir()
        if isinstance(error, OSError):
            raise unwritten(str(path), error) from error
        raise


@contextlib.contextmanager
def _emptied_on_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for child in path.iterdir():
                if child.name != lock.NAME:
                    shutil.rmtree(child) if child.is_dir() else child.unlink()
        raise
