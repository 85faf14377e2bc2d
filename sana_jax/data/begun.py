"""A folder that a command fills in one run or in several: its settings are written first."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import write_atomically
from sana_jax.runtime.lock import NAME as LOCK

SETTINGS = "settings.json"  # of a folder that may not be finished


def begun(
    folder: Path, settings: dict[str, Any], free: Collection[str] = ("data",)
) -> dict[str, Any]:
    """Returns the settings that a folder was begun with, or writes them to a new one.

    Raises UserError if the folder has other settings. Those named by `free` may differ, such as the
    name of the data, whose fingerprint is another setting.
    """
    path = folder / SETTINGS
    try:
        there = json.loads(path.read_bytes())
    except FileNotFoundError:
        if any(child.name != LOCK for child in folder.iterdir()):
            raise UserError(f"--out={folder} holds other files; name a new folder") from None
        write_json(path, settings)
        return settings
    except (ValueError, RecursionError):
        there = {}
    if not isinstance(there, dict):
        there = {}
    names = {n for n in {*there, *settings} if there.get(n) != settings.get(n)} - {*free}
    if names:
        names = sorted(names)
        first = names[0]
        was, now = there.get(first), settings.get(first)
        while isinstance(was, dict) and isinstance(now, dict):
            key = min(n for n in {*was, *now} if was.get(n, ...) != now.get(n, ...))
            first, was, now = f"{first}.{key}", was.get(key), now.get(key)
        raise UserError(
            f"--out={folder} was begun with other settings ({', '.join(names)}): {first} was"
            f" {was}, now {now}; name another folder"
        )
    return there


def write_json(path: Path, value: Any, part: str = ".part") -> None:
    write_atomically(path, (json.dumps(value, sort_keys=True) + "\n").encode(), part)
