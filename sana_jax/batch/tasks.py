"""Tasks: prompts and their settings from flags and files, and their batches."""

import codecs
import dataclasses
import difflib
import functools
import io
import json
import os
import re
import reprlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from etils import epath

from sana_jax.runtime.checks import MAX_PICTURE_SEED, MAX_STEPS, MAX_TEXT
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import UNREACHABLE, check_is_file, nests, reason_of

if TYPE_CHECKING:  # flags and files are read before jax is
    from sana_jax.batch.image_files import Inputs
    from sana_jax.pipeline.facts import Facts
    from sana_jax.pipeline.request import Request

MAX_IMAGES = 10**6  # of one run: names have six digits
MAX_FILE, MAX_LINE = 2**27, 2**22  # bytes of prompts: they take several times as much memory
MAX_PATH = 4096  # characters
MAX_LEVELS = 16  # of lists and objects in a line

Row = tuple[str, dict[str, Any]]  # how complaints about it begin, and the fields that it gives


@dataclasses.dataclass(frozen=True)
class Task:
    """One image to draw."""

    number: int  # position among all images of the run
    prompt: str
    seed: int
    negative_prompt: str = ""
    height: int | None = None  # pixels; None: the checkpoint's native size
    width: int | None = None
    num_steps: int | None = None  # None: the checkpoint's usual number
    guidance_scale: float = 4.5
    image: str | None = None  # the file that it starts from; None: noise alone
    strength: float | None = None  # 0 .. 1, where there is an image; None: the usual one
    mask: str | None = None
    inputs: "Inputs | None" = None  # what is in the files
    row: Row = dataclasses.field(default=("", {}), repr=False, compare=False)  # where it came from

    @property
    def extras(self) -> dict[str, Any]:
        """The fields of its line that this program does not read."""
        return {name: value for name, value in self.row[1].items() if name not in FIELDS}

    def place_of(self, name: str) -> str:
        """Returns where a field was given: its line, or "--" for the flags."""
        where, given = self.row
        return where if name in given else "--"

    @property
    def file(self) -> str:
        """The picture's name, which does not depend on the prompt."""
        return f"{self.number:06d}_{self.seed}.png"

    @property
    def shape(self) -> tuple:
        """The settings that are compiled in, or decide the steps, which tasks of a batch share."""
        start = self.strength, self.mask is not None
        return self.height, self.width, self.num_steps, self.guidance_scale > 1, *start


@dataclasses.dataclass(frozen=True)
class Batch:
    """Tasks that are drawn together, and the number of images that the devices compute."""

    tasks: list[Task]
    size: int
    request: "Request | None" = None  # for `size` images, padding included

    def padded(self) -> list[Task]:
        """Repeats the last task up to `size`: a smaller batch would be compiled anew."""
        return self.tasks + self.tasks[-1:] * (self.size - len(self.tasks))


def _is_integer(value, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_text(value) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


def _is_path(value) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_PATH


TEXT = f"a string of up to {MAX_TEXT} characters"
# What a line of a .jsonl file may hold: what it takes, and whether a value is that.
FIELDS = {
    "prompt": (TEXT, _is_text),
    "negative_prompt": (TEXT, _is_text),
    "seed": (
        f"a whole number in 0 .. {MAX_PICTURE_SEED}",
        lambda v: _is_integer(v, 0, MAX_PICTURE_SEED),
    ),
    "height": ("a whole number of pixels above 0", lambda v: _is_integer(v, 1, 2**31)),
    "width": ("a whole number of pixels above 0", lambda v: _is_integer(v, 1, 2**31)),
    "num_steps": (f"a whole number in 1 .. {MAX_STEPS}", lambda v: _is_integer(v, 1, MAX_STEPS)),
    "guidance_scale": (
        "a number in 0 .. 1000, where up to 1 is no guidance",
        lambda v: type(v) in (int, float) and 0 <= v <= 1000,
    ),
    "image": ("the path of a picture", _is_path),
    "strength": ("a number above 0, up to 1", lambda v: type(v) in (int, float) and 0 < v <= 1),
    "mask": ("the path of a mask, white where the picture is redrawn", _is_path),
}
OF_IMAGES = "strength", "mask"  # fields that need an image


def read_rows(path: str, flag: str = "--prompts=") -> list[Row]:
    """Reads the prompts of a file: .txt, one a line; .jsonl, an object a line with keys of FIELDS.

    There null stands for a key that is absent, and other keys are kept; paths begin at the file's
    folder. Blank lines are skipped. Raises UserError, which begins with the flag that named it.
    """
    file = epath.Path(path)
    kind = file.suffix.lower()
    if kind not in (".txt", ".jsonl"):
        raise UserError(
            f"{flag}{path}: give a .txt file with a prompt a line, or a .jsonl file"
            ' with an object a line, such as {"prompt": "a red circle", "seed": 1}'
        )
    try:
        check_is_file(file, f"{flag}{path}")
        if (size := file.stat().length) > MAX_FILE:
            raise UserError(f"{flag}{path} has {size} bytes, {MAX_FILE} at most: split it")
        content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    except UNREACHABLE as error:
        raise UserError(f"{flag}{path}: {reason_of(error)}") from None
    content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    rows: list[Row] = []
    for number, line in enumerate(io.BytesIO(content), 1):
        where = f"{path} line {number}: "
        if len(line) > MAX_LINE:
            raise UserError(f"{where}it has {len(line)} bytes, {MAX_LINE} at most")
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            raise UserError(f"{where}it is not UTF-8 text") from None
        if text and len(rows) == MAX_IMAGES:
            raise UserError(f"{where}{MAX_IMAGES} prompts stand before it, which is the most")
        if text:
            rows.append((where, {"prompt": text} if kind == ".txt" else _parse(text, where)))
    if not rows:
        raise UserError(f"{flag}{path} holds no prompt")
    for _, row in rows:
        for name in ("image", "mask"):
            if _is_path(row.get(name)):
                row[name] = os.fspath(file.parent / row[name])
    return rows


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text, object_pairs_hook=_once)
    except _Twice as error:
        raise UserError(f"{where}{reprlib.repr(error.args[0])} is there twice") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}it is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}it is no JSON object")
    if nests(row, MAX_LEVELS):
        raise UserError(f"{where}lists and objects nest more than {MAX_LEVELS} deep")
    row = {name: x for name, x in row.items() if x is not None or name not in FIELDS}
    if "prompt" not in row:
        check_fields(row, where)  # it may be misspelt
        raise UserError(f'{where}"prompt" is missing')
    return row


class _Twice(Exception):
    """A key that an object has twice: JSON's readers take one of the values in silence."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Twice(name)
        found[name] = value
    return found


def check_fields(values: dict[str, Any], where: str) -> None:
    """Raises UserError for the first field that is out of range, or misspelt."""
    for name, value in values.items():
        if name in FIELDS:
            takes, accepts = FIELDS[name]
            if not accepts(value):
                raise UserError(f"{where}{name}={reprlib.repr(value)}: it takes {takes}")
        elif meant := next((known for known in FIELDS if _is_misspelt(name, known)), None):
            if meant not in values:
                wrong = f"unknown key {reprlib.repr(name)}; did you mean {meant}?"
                raise UserError(where + wrong)


@functools.lru_cache
def _is_misspelt(name: str, known: str) -> bool:
    """Returns True for other cases and hyphens, letters that changed places, one too many or few.

    One that is another makes a word, such as weight, which may be a key of another program.
    """
    one, other = (re.sub(r"[\W_]", "", each).lower() for each in (name[:40], known))
    near = difflib.SequenceMatcher(None, one, other).ratio() > 0.85 and len(one) != len(other)
    return near or sorted(one) == sorted(other)


def make_tasks(rows: list[Row], common: dict[str, Any], seed: int, images_each: int) -> list[Task]:
    """Makes a task for every image: a row's fields, else the flags `common`.

    Images of one prompt follow one another. Seeds count up from `seed`, or from the row's own.
    Raises UserError.
    """
    check_fields({"seed": seed, **common}, "--")
    if len(rows) * images_each > MAX_IMAGES:
        count = f"{len(rows)} prompts x {images_each}"
        raise UserError(f"--num_images_per_prompt={images_each}: {count} is above {MAX_IMAGES}")
    tasks = []
    for i, (where, row) in enumerate(rows):
        check_fields(row, where)
        first = row.get("seed", seed + i * images_each)
        if first + images_each - 1 > MAX_PICTURE_SEED:
            wrong = f"{where}seed={first}" if "seed" in row else f"--seed={seed}"
            raise UserError(f"{wrong}: seeds count up from it, and end at {MAX_PICTURE_SEED}")
        values = common | {name: value for name, value in row.items() if name in FIELDS}
        values["guidance_scale"] = float(values["guidance_scale"])  # 4 and 4.0 are one setting
        _start_from(values, row, where)
        for j in range(images_each):
            values["seed"] = first + j
            tasks.append(Task(number=len(tasks), row=(where, row), **values))
    for name in OF_IMAGES:
        if name in common and not any(task.image for task in tasks):
            raise UserError(f"--{name}={common[name]} is of no use without an image: give --image")
    return tasks


def _start_from(values: dict[str, Any], row: dict[str, Any], where: str) -> None:
    """Checks the fields of images, and drops flags that are for other prompts' images."""
    if "image" in values:
        if "strength" in values:
            values["strength"] = float(values["strength"])
        return
    for name in OF_IMAGES:
        if name in row:
            raise UserError(f"{where}{name}={row[name]!r:.60} is of no use without an image")
        values.pop(name, None)


def with_defaults(
    tasks: Iterable[Task], facts: "Facts", max_pixels: int, num_steps: int | None = None
) -> list[Task]:
    """Fills in what tasks leave to the checkpoint. Raises UserError for a size that is too large.

    Args:
      facts: what is known of the checkpoint.
      max_pixels: the largest height x width; a side may reach four times its square root.
      num_steps: of tasks that do not say it; None: the checkpoint's.
    """
    return [_with_defaults(task, facts, max_pixels, num_steps or facts.num_steps) for task in tasks]


def _with_defaults(task: Task, facts: "Facts", max_pixels: int, num_steps: int) -> Task:
    native = facts.native_size
    sizes = {"height": task.height or native, "width": task.width or native}
    height, width = sizes.values()
    if height * width > max_pixels or max(height, width) ** 2 > 16 * max_pixels:
        name, side = max(sizes.items(), key=lambda item: item[1])
        raise UserError(
            f"{task.place_of(name)}{name}={side}: {height} x {width} pixels are more than"
            f" --max_pixels={max_pixels} allows; raise it if the memory is there"
        )
    strength = (task.strength or facts.strength) if task.image else None
    steps = task.num_steps or num_steps
    return dataclasses.replace(task, **sizes, num_steps=steps, strength=strength)


def make_batches(tasks: list[Task], batch_size: int, divisor: int) -> list[Batch]:
    """Groups tasks of one shape into batches, in order; a function of the tasks alone.

    So a resumed run computes the batches of an unbroken one, and the same bits.

    Args:
      batch_size: images in a batch; fewer if a shape has no more.
      divisor: the devices that share a batch; sizes are rounded up to its multiples.
    """
    groups: dict[tuple, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.shape, []).append(task)
    batches = []
    for group in groups.values():
        size = -(-min(batch_size, len(group)) // divisor) * divisor
        batches += [Batch(group[i : i + size], size) for i in range(0, len(group), size)]
    return batches
