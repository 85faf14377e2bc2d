"""Decides which images of a folder are of a split, by the names of the folders that they are in.

A folder is called after a split in many ways: train, Train, train2017, training_set, images/train;
val, valid, dev, test, testA, DIV2K_valid_HR. What any part of a path calls held out is never of the
split train. Layouts that may mean two things are refused.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from sana_jax.data.records import NoData
from sana_jax.runtime.errors import UserError

_NOUN = "(?:set|split|data|images?|imgs?|photos|pictures)"
_HELD_OUT = {
    "validation": "(?:mini)?val|valid|validation|validate|vld|dev|devel",
    "test": "test|testing|tst|eval|evaluation|h[eo]ld_?out",
}
# Any word of the name counts for what is held out; to train on it the whole name has to say so.
_WORDS = {kind: re.compile(f"(?:^|_)(?:{w}){_NOUN}?(?:_|$)") for kind, w in _HELD_OUT.items()}
_TRAIN_WORD = re.compile("(?:^|_)(?:train(?:ing)?|trn)(?:_|$)")
_TRAIN = re.compile(f"_?(?:{_NOUN}_)?(?:train(?:ing)?|trn)_?{_NOUN}?(?:_[a-z])?_?")
# Kinds of folders that a split may be read from, the first that is there.
_READ_FROM = {"train": ("train",), "validation": ("validation",), "test": ("test", "validation")}


class Choice(NamedTuple):
    """The images of a split.

    Attributes:
      folder: what all of their paths begin with, "" or "a/b/".
      keeps: returns whether a file of this path is of the split.
      note: what is used, held out and left out; "" where all is used and nothing had to be chosen.
    """

    folder: str
    keeps: Callable[[str], bool]
    note: str


def split_of(name: str) -> str:
    """Returns what a folder's name says: "train", "validation", "test" or ""."""
    words = _words(name)
    for kind, pattern in _WORDS.items():
        if pattern.search(words):
            return kind
    return "train" if _TRAIN.fullmatch(words) else ""


def split_of_file(name: str) -> str:
    """Returns what an archive's name says, as `split_of`; any word of it may be train."""
    return split_of(name) or ("train" if _TRAIN_WORD.search(_words(name)) else "")


def _words(name: str) -> str:
    return re.sub("(?<=[a-z])(?=[A-Z])|[^A-Za-z]+", "_", name).lower()


def choose(images: Iterable[str], split: str, where: str) -> Choice:
    """Chooses the images of `split`; `where` is what the user calls the folder.

    A folder of exactly that name is the split. Otherwise a folder is that is called like it, such
    as train2017 for train; the split test may be read from a validation split. Without a folder
    called after any split all images are the split train.

    Args:
      images: the paths of all images below the folder.

    Raises NoData if there is no such split, and UserError if several folders may be it.
    """
    images = list(images)
    groups = {name: _group(name) for name in images}
    wanted, exact = split_of(split), split.strip("/") + "/"
    held_out = [name for name in images if groups[name][0] in _HELD_OUT]
    if any(name.startswith(exact) for name in images):
        folders, whole = [exact], wanted in _HELD_OUT

        def keeps(name: str) -> bool:
            below = name.removeprefix(exact)
            return below != name and (whole or _group(below)[0] not in _HELD_OUT)

    else:
        there = {kind for kind, _ in groups.values()}
        kind = next((kind for kind in _READ_FROM.get(wanted, ()) if kind in there), None)
        if kind is None and (wanted != "train" or held_out):
            raise NoData(_missing(images, split, where))
        folders = sorted({folder for found, folder in groups.values() if kind and found == kind})
        _refuse_several(folders, split, where)

        def keeps(name: str) -> bool:
            return kind is None or _group(name)[0] == kind

    used = [name for name in images if keeps(name)]
    left_out = Counter(groups[n][1] for n in images if not groups[n][0] and not keeps(n))
    if wanted == "train" and folders and not held_out and (beside := set(left_out) - {""}):
        raise UserError(
            f"{where}: {_list(folders)} may be the split {split} or, like"
            f" {_list(sorted(beside))} beside it, one of several classes: give"
            f" {where.rstrip('/')}/{folders[0].rstrip('/')} as the data to use it alone, or rename"
            " it to use all"
        )
    held = Counter(groups[n][1] for n in held_out if not keeps(n) and wanted not in _HELD_OUT)
    more = Counter(groups[n][1] for n in images if groups[n][0] == "train" and not keeps(n))
    left_out += more if wanted not in _HELD_OUT else Counter()
    note = ""
    if folders or held or left_out:
        note = f"split {split}: {len(used)} of {_list(folders) if folders else 'all folders'}"
        note += f"; held out: {_counted(held)}" if held else ""
        note += f"; left out: {_counted(left_out)}" if left_out else ""
    return Choice(folders[0] if len(folders) == 1 else "", keeps, note)


def _group(name: str) -> tuple[str, str]:
    """Returns a path's split and the folder that is called so; or "" and the path's first folder.

    What is held out decides, above or below a folder called train.
    """
    parts = name.split("/")[:-1]
    kinds = [split_of(part) for part in parts]
    places = [i for i, kind in enumerate(kinds) if kind in _HELD_OUT]
    places += [i for i, kind in enumerate(kinds) if kind]
    if not places:
        return "", "".join(f"{part}/" for part in parts[:1])
    return kinds[places[0]], "".join(f"{part}/" for part in parts[: places[0] + 1])


def _refuse_several(folders: list[str], split: str, where: str) -> None:
    """Raises UserError for train2014 and train2017; each class may have a split of its own."""
    names = {folder.split("/")[-2] for folder in folders}
    if len(names) > 1:
        raise UserError(
            f"{where}: {_list(folders)} may each be the split {split}: name one of them as the"
            " split"
        )


def _missing(images: list[str], split: str, where: str) -> str:
    inside = sorted({name.partition("/")[0] for name in images if "/" in name})
    there = f"there are {', '.join(inside[:10])}" if inside else "it has no subfolders"
    return (
        f"{where}: no split {split!r}, which would be a subfolder; {there}."
        " Make one, or name another split (a folder without subfolders is the split train)"
    )


def _list(folders: Iterable[str], most: int = 5) -> str:
    names = [folder.rstrip("/") for folder in folders]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" * (len(names) > most))


def _counted(folders: Counter) -> str:
    """Returns "30 of val2017, 2 beside the folders"."""
    lines = [
        f"{count} of {name.rstrip('/')}" if name else f"{count} in no folder"
        for name, count in folders.most_common(5)
    ]
    more = len(folders) - len(lines)
    return ", ".join(lines) + (f" and those of {more} more" if more else "")
