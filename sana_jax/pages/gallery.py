"""The gallery of folders that `sample` wrote: their pictures with prompts, seeds and settings."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from etils import epath

from sana_jax.batch.manifest import Line, Manifest
from sana_jax.pages import embed
from sana_jax.pages.page import as_json, for_script, render
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import UNREACHABLE, absolute, is_local, reason_of, require_folder

HASHES = "file", "sha256", "key"  # fields of a line that nobody filters by


def read(folder: str) -> tuple[list[Line], int]:
    """Returns the lines of a folder's pictures, and how many others there are. Raises UserError."""
    path = absolute(folder)
    try:
        require_folder(path, folder, "name one that `sample` wrote")
        if not (path / "manifest.jsonl").exists():
            hint = "a run of a training is shown by python -m sana_jax.report"
            raise UserError(f"{folder} has no manifest.jsonl, which `sample` writes; {hint}")
        found = Manifest(path / "manifest.jsonl")
    except UNREACHABLE as error:
        raise UserError(f"{folder}: {reason_of(error)}") from None
    lines = [line for file, line in found.lines.items() if os.path.basename(file) == file]
    if not lines:
        raise UserError(f"{folder}/manifest.jsonl names no picture yet")
    return lines, len(found.strange) + len(found.lines) - len(lines)


def page(folders: list[str], out: Path, most: int) -> tuple[bytes, list[str]]:
    """Returns the page of folders, of `most` bytes at most, and notes on what it leaves out.

    Args:
      folders: each is a column of the page; pictures of one prompt and seed stand side by side.
      out: the file that the page is for, from which links to the pictures begin.

    Raises UserError for a folder without pictures, or where the settings alone are too large.
    """
    runs, notes, paths = [], [], []
    room = max(1, most // embed.LEAST // len(folders))  # pictures of each folder
    for folder in folders:
        lines, others = read(folder)
        if others:
            notes.append(f"{folder}: {others} lines of manifest.jsonl are not of `sample`")
        if len(lines) > room:
            shown = f"the first {room} of {len(lines)} pictures are shown"
            notes.append(f"{folder}: {shown}; raise --megabytes to see the others")
        runs.append(_run(_name(folder, folders), absolute(folder), lines[:room], out))
        paths += [absolute(folder) / line["file"] for line in lines[:room]]
    left = most - len(render("gallery.html", {"runs": runs, "notes": notes}))
    if left < 0:
        raise UserError(f"--megabytes={most / 10**6:g}: the settings alone are {-left} bytes more")
    pictures, bad = [one for run in runs for one in run["pictures"]], []
    for one, path, uri in zip(pictures, paths, embed.embed(paths, left), strict=True):
        if isinstance(uri, ValueError):
            bad.append(f"{path}: {uri}")
        else:
            one["uri"] = uri
    if bad:
        notes.append(f"{len(bad)} pictures cannot be shown, such as {bad[0]}")
    return render("gallery.html", {"runs": runs, "notes": notes}), notes


def _run(name: str, folder: epath.Path, lines: list[Line], out: Path) -> dict[str, Any]:
    """Returns what the page knows of a folder, its pictures empty."""
    settings = [for_script({k: x for k, x in line.items() if k not in HASHES}) for line in lines]
    names = dict.fromkeys(key for each in settings for key in each)
    varying = [n for n in names if len({as_json([n in x, x.get(n)]) for x in settings}) > 1]
    return {
        "name": name,
        "common": {n: x for n, x in settings[0].items() if n not in varying},
        "varying": varying,
        "pictures": [
            {
                "file": line["file"],
                "link": _link(folder / line["file"], out),
                "settings": {n: x for n, x in own.items() if n in varying},
                "uri": None,
            }
            for line, own in zip(lines, settings, strict=True)
        ],
    }


def _name(folder: str, folders: list[str]) -> str:
    """Returns the folder's own name, or all of its path where two have the same."""
    name = absolute(folder).name
    return folder if [absolute(each).name for each in folders].count(name) > 1 else name


def _link(picture: epath.Path, out: Path) -> str | None:
    """Returns the way from the page to a picture on the same disk."""
    if not is_local(picture):
        return None
    way = os.path.relpath(picture, os.path.abspath(out.parent))
    return quote(way, errors="replace")  # a damaged line may name what no file can be called
