"""One HTML file that needs nothing else: styles, scripts, data and pictures are inside.

The templates lie beside this file. {{name}} in one stands for the file of that name, and {{data}}
for the page's data as JSON, which its script reads from the element of that id. The page forbids
itself every connection. What comes from prompts and configs is set as text, never as HTML.
"""

import json
import re
from pathlib import Path
from typing import Any

from etils import epath

from sana_jax.runtime.files import unwritten, write_atomically

HERE = Path(__file__).parent


def render(template: str, data: Any) -> bytes:
    """Returns the page of a template beside this file, for its data, which has no NaN."""
    return _filled(template, as_json(data)).encode()


def save(path: Path, content: bytes) -> None:
    """Writes a page atomically to --out. Raises UserError, or Retry where the disk is full."""
    try:
        write_atomically(epath.Path(path), content)
    except OSError as error:
        raise unwritten(f"--out={path}", error) from None


def as_json(data: Any) -> str:
    """Returns JSON that may stand in HTML: no text in it can end its element."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def for_script(value: Any) -> Any:
    """Returns a value of JSON with text for the numbers that JavaScript has not.

    These are NaN, infinities, and integers that a float would round, such as seeds of 64 bits.
    """
    return json.loads(json.dumps(value), parse_constant=str, parse_int=_exact)


def _exact(digits: str) -> int | str:
    return int(digits) if abs(int(digits)) < 2**53 else digits


def _filled(template: str, data: str) -> str:
    def part(match: re.Match) -> str:
        return data if match[1] == "data" else _filled(match[1], data)

    return re.sub(r"\{\{([\w.]+)\}\}", part, (HERE / template).read_text(encoding="utf-8"))
