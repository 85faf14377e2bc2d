"""The runs in folders that a user names, with everything that they have written so far.

A run is a folder with metrics.jsonl or checkpoints/: that of a training, that of an autoencoder's
phase, or one of those that launch/sweep makes below its --out. Nothing in it is changed.
"""

import dataclasses
import json
import re
from typing import Any

from etils import epath

from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import UNREACHABLE, absolute, parse_json, reason_of, require_folder
from sana_jax.training.checkpoints.document import keys, sha256
from sana_jax.training.rows import Row, is_finite, read_rows

DEPTH = 3  # folders below the one that is named: SETTING/seed_N/PHASE
# What a run writes below its folder, where no other run is looked for.
INSIDE = {"checkpoints", "images", "tensorboard", "model", "profile", "data", "evaluations"}
SEED = re.compile(r"/seed_\d+(?=/|$)")  # in the name of one of a sweep's seeds
PICTURE = re.compile(r"(.+)_(\d{8,})\.png")
EVALUATION = re.compile(r"(?:(.+)_)?(\d+)\.\w+")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, as its files tell it."""

    name: str
    folder: epath.Path
    rows: list[Row]  # of metrics.jsonl
    checkpoints: list[int]  # the steps that are there
    document: dict[str, Any]  # of the newest checkpoint that can be read, or {}
    results: dict[str, Any]  # of an autoencoder's phase that is over, or {}

    @property
    def group(self) -> str:
        """The setting of a sweep, which several seeds share."""
        return SEED.sub("", self.name)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config, as "a.b" -> value."""
        found = self.document.get("config") or self.results.get("about") or {}
        return keys(found) if isinstance(found, dict) and found else {}

    @property
    def steps(self) -> int | None:
        """The steps of the whole run."""
        config = self.config
        return config.get("recipe.steps", config.get("phase.steps"))

    @property
    def last_step(self) -> int:
        return max([row["step"] for row in self.rows] + self.checkpoints, default=0)

    @property
    def prompts(self) -> list[str]:
        """The prompts of its pictures, in their order."""
        found = self.config.get("images.prompts")
        return [str(prompt) for prompt in found] if isinstance(found, list) else []

    def pictures(self) -> dict[str, dict[int, epath.Path]]:
        """Returns name -> step -> the sheet of pictures that was written then."""
        found: dict[str, dict[int, epath.Path]] = {}
        for path in _listed(self.folder / "images"):
            if match := PICTURE.fullmatch(path.name):
                found.setdefault(match[1], {})[int(match[2])] = path
        return found

    def evaluations(self) -> dict[int | None, dict[str, float]]:
        """Returns step -> figures, from results.json and from what evaluate printed.

        Of a file NAME_STEP in evaluations/ the last line is read, which is evaluate's JSON; None
        stands for a file whose name has no step. The figures have NAME before them, or the task's
        name where there is none.
        """
        found: dict[int | None, dict[str, float]] = {}
        last = self.results.get("steps")
        for step, moment in (0, "before"), (last if isinstance(last, int) else None, "after"):
            for size, figures in _object(self.results.get(moment)).items():
                named = {f"{name}_{size}": x for name, x in _object(figures).items()}
                found.setdefault(step, {}).update(_numbers(named))
        for path in _listed(self.folder / "evaluations"):
            figures = _parsed(path.read_bytes().strip().rpartition(b"\n")[2])
            if "task" not in figures:
                continue
            match = EVALUATION.fullmatch(path.name)
            title = match and match[1] or figures["task"]
            named = {f"{title}: {name}": x for name, x in figures.items()}
            found.setdefault(int(match[2]) if match else None, {}).update(_numbers(named))
        return found


def find(folders: list[str]) -> list[Run]:
    """Returns all runs in and below folders.

    Raises UserError, naming the folder without any, and OSError for a file that cannot be read.
    """
    found: dict[epath.Path, str] = {}
    labels = [absolute(folder).name for folder in folders]
    for given, label in zip(folders, labels, strict=True):
        folder = absolute(given)
        label = given if labels.count(label) > 1 else label
        try:
            require_folder(folder, given, "name that of a run")
            below = list(_runs_below(folder, DEPTH))
        except UNREACHABLE as error:
            raise UserError(f"{given}: {reason_of(error)}") from None
        if not below:
            if (folder / "manifest.jsonl").exists():
                hint = f"pictures of `sample` are shown by python -m sana_jax.gallery {given}"
            else:
                hint = "a run has metrics.jsonl; name its folder, or one above it"
            raise UserError(f"{given} has no run: {hint}")
        for path in below:
            inner = path.relative_to(folder).as_posix()
            parts = [label] * (len(folders) > 1 or inner == ".") + [inner] * (inner != ".")
            found.setdefault(path, "/".join(parts))
    return [_read(path, name) for path, name in found.items()]


def _runs_below(folder: epath.Path, depth: int):
    if (folder / "metrics.jsonl").exists() or (folder / "checkpoints").is_dir():
        yield folder
    for path in _listed(folder) if depth else ():
        if path.name not in INSIDE and not path.name.startswith(".") and path.is_dir():
            yield from _runs_below(path, depth - 1)


def _read(folder: epath.Path, name: str) -> Run:
    steps = sorted(int(p.name) for p in _listed(folder / "checkpoints") if p.name.isdecimal())
    documents = (folder / "checkpoints" / str(step) / "run" / "metadata" for step in steps[::-1])
    document = next(filter(_is_whole, map(_json, documents)), {})
    return Run(name, folder, read_rows(folder), steps, document, _json(folder / "results.json"))


def _json(path: epath.Path) -> dict[str, Any]:
    return _parsed(path.read_bytes()) if path.exists() else {}


def _is_whole(document: dict[str, Any]) -> bool:
    """Returns True if a checkpoint's document has the hash that it was written with."""
    return document.pop("sha256", None) == sha256(document)


def _parsed(text: bytes) -> dict[str, Any]:
    """Returns an object of JSON; an empty one for anything else."""
    try:
        return _object(parse_json(text))
    except ValueError:
        return {}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {k: x for k, x in values.items() if is_finite(x)}


def _listed(folder: epath.Path) -> list[epath.Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def shown(value: Any) -> str:
    """Returns a value of a config as text."""
    return value if isinstance(value, str) else json.dumps(value)
