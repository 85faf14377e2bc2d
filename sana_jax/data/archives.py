"""Finds the archives that a data set consists of, and those of a split.

    DIR                     all in the folder and below, in the order of their paths
    FILE                    one archive
    DIR/{000..012}.tar      braces as a shell expands them, so quote them there
    DIR/*.tar               names as a shell finds them
    a.tar::b.tar            several of these

An archive is called after its split by a folder, as pictures are (layout.py), or by its own name:
data/train-00000-of-00004.parquet, cc3m-validation-0007.tar.
"""

import contextlib
import glob
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from absl import logging
from etils import epath

from sana_jax.data import layout
from sana_jax.data.records import NoData
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import named

MOST = 1_000_000  # names that one pair of braces may stand for
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


class Archive(NamedTuple):
    """A file, and what keys and messages call it: its path below the folder of the data."""

    name: str
    path: epath.Path


def find(spec: str, ending: str) -> list[epath.Path]:
    """Returns the files that `spec` stands for, in order; those of folders have the `ending`.

    Raises NoData if there are none or one that is named is missing, UserError, and OSError.
    """
    if re.match(r"pipe:|https?:", spec):
        raise UserError(f"{spec:.60}: data is read from files; copy it to a folder")
    found: dict[epath.Path, None] = {}
    for pattern in spec.split("::"):
        for name in expand(named(pattern)):
            path = epath.Path(name)
            if path.is_dir():
                found |= dict.fromkeys(sorted(_below(path, ending)))
            elif path.exists():
                found[path] = None
            elif glob.has_magic(name):
                found |= dict.fromkeys(sorted(_matches(name)))
            else:
                raise NoData(f"{name}: there is no such file or folder")
    if not found:
        raise NoData(f"{spec}: there is no *{ending} in it")
    return list(found)


def of_split(paths: list[epath.Path], spec: str, split: str) -> list[Archive]:
    """Returns the archives of a split. Raises NoData if there is none, UserError if it is unclear.

    `spec` is what the user calls the data.
    """
    texts = [os.fspath(path) for path in paths]
    root = named(spec).rstrip("/") + "/"
    if not all(text.startswith(root) for text in texts):
        root = texts[0][: len(os.path.commonprefix(texts).rpartition("/")[0])] + "/"
        root = root if texts[0].startswith(root) else ""
    archives, shown = [], []
    for text, path in zip(texts, paths, strict=True):
        archives.append(Archive(text.removeprefix(root), path))
        folder, slash, file = archives[-1].name.rpartition("/")
        kind = layout.split_of_file(file)
        shown.append(f"{folder}{slash}{kind}/{file}" if kind else archives[-1].name)
    choice = layout.choose(shown, split, spec)
    if choice.note:
        logging.warning("%s: %s", spec, choice.note)
    return [each for each, name in zip(archives, shown, strict=True) if choice.keeps(name)]


def expand(pattern: str) -> list[str]:
    """Returns the names that a pattern with braces stands for: {000..012} and {a,b}."""
    found = _BRACES.search(pattern)
    if not found:
        return [pattern]
    first, last, words = found.groups()
    if words is None:
        if not 0 <= int(last) - int(first) < MOST:
            raise UserError(f"{pattern:.60}: {found[0]} stands for nothing, or for too many names")
        values = [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    else:
        values = words.split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [name for value in values for name in expand(f"{before}{value}{after}")]


def _below(folder: epath.Path, ending: str) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.name.lower().endswith(ending):
            yield path
        elif path.is_dir() and not os.path.islink(path):
            yield from _below(path, ending)


def _matches(pattern: str) -> Iterator[epath.Path]:
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    folder = "/".join(parts[:fixed]) or ("/" if pattern.startswith("/") else ".")
    with contextlib.suppress(FileNotFoundError):
        yield from epath.Path(folder).glob("/".join(parts[fixed:]))
