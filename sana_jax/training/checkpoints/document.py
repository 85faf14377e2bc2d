"""The document beside a checkpoint's arrays, which says what run it is of: its parts as JSON.

`keys`, `show` and `some` are for messages about two documents that differ.
"""

import base64
import hashlib
import json
from typing import Any

Document = dict[str, Any]

# Keys of a config that may change from one run to the next in the same folder, as globs.
FREE = (
    "steps",
    "*_every",
    "keep",
    "max_streak",
    "watchdog_seconds",
    "profile",
    "workdir",
    "compilation_cache",
    "loader.*",
)

ABSENT = object()  # in place of a value, where a document lacks a key


def sha256(document: Document) -> str:
    """The hash of a document, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def encode(iterator: Any) -> Any:
    """An iterator's state as JSON; grain gives a dict or bytes."""
    if isinstance(iterator, bytes):
        return {"base64": base64.b64encode(iterator).decode()}
    return {"json": iterator}


def decode(encoded: Document) -> Any:
    """An iterator's state, of what `encode` made of it."""
    if "base64" in encoded:
        return base64.b64decode(encoded["base64"])
    return encoded["json"]


def keys(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested document as {"a.b": value}."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= keys(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def show(tree: dict[str, Any], key: str) -> str:
    """A value of what `keys` gives, for a message."""
    value = tree.get(key, ABSENT)
    return "absent" if value is ABSENT else value if isinstance(value, str) else json.dumps(value)


def some(lines: list[str], most: int = 10) -> str:
    """The first lines, and how many more there are."""
    more = f" and {len(lines) - most} more" if len(lines) > most else ""
    return ", ".join(lines[:most]) + more


def brief(error: Exception) -> str:
    """An error in one line: its kind and the start of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]:.200}"
