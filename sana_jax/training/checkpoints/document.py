"""The JSON document beside a checkpoint's arrays, which identifies the run that saved them.

`keys`, `show`, `some` and `brief` are for comparing documents and for messages.
"""

import base64
import hashlib
import json
from typing import Any

Document = dict[str, Any]

# Globs of the config's keys that may change between two runs in the same folder, unless the caller
# of Checkpoints gives its own.
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

ABSENT = object()  # stands for the value of a key that a document lacks


def sha256(document: Document) -> str:
    """Returns the hash of a document, which does not depend on the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def encode(iterator: Any) -> Any:
    """Returns a data iterator's state as JSON; grain's states are dicts or bytes."""
    if isinstance(iterator, bytes):
        return {"base64": base64.b64encode(iterator).decode()}
    return {"json": iterator}


def decode(encoded: Document) -> Any:
    """Returns the data iterator's state that `encode` was given."""
    if "base64" in encoded:
        return base64.b64decode(encoded["base64"])
    return encoded["json"]


def keys(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens a nested document to {"a.b": value}."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= keys(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def show(tree: dict[str, Any], key: str) -> str:
    """Returns the value of `key` in a tree flattened by `keys`, as text for a message."""
    value = tree.get(key, ABSENT)
    return "absent" if value is ABSENT else value if isinstance(value, str) else json.dumps(value)


def some(lines: list[str], most: int = 10) -> str:
    """Returns the first `most` lines, and the number of the others, for a message."""
    more = f" and {len(lines) - most} more" if len(lines) > most else ""
    return ", ".join(lines[:most]) + more


def brief(error: Exception) -> str:
    """Returns an error in one line: its type and the start of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]:.200}"
