"""The benchmarks whose judges are other programs: their prompts, and where they look for pictures.

What a judge reads is taken from its own code: djghosh13/geneval (evaluation/evaluate_images.py),
TencentQQGYLab/ELLA (dpg_bench/compute_dpg_bench.py), THUDM/ImageReward (test-benchmark.py) and
tgxs002/HPSv2 (hpsv2/evaluation.py).
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import UNREACHABLE, check_is_file, parse_json, reason_of

Line = dict[str, Any]  # of manifest.jsonl, or of a file of prompts
GENEVAL = "tag", "include", "exclude", "prompt"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What one judge wants."""

    each: int  # pictures of a prompt
    fields: tuple[str, ...]  # that a prompt's line has beside the prompt
    # Where picture `j` of prompt `p` goes, given the prompt's line, the run's name and the number
    # of prompts before it with the same first field.
    place: Callable[[int, int, Line, str, int], str]
    grid: bool = False  # all pictures of a prompt in one, in two columns
    # The files beside the pictures that the judge reads, given the lines of all prompts.
    beside: Callable[[Sequence[Line]], dict[str, Any]] = lambda lines: {}
    # The prompts in the benchmark's own file or folder; None: `sample` reads the file as it is.
    prompts: Callable[[Path], list[Line]] | None = None


def _objects(path: Path) -> Any:
    """Returns the JSON in a file. Raises UserError."""
    check_is_file(path, f"--source={path}")
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from None


def _texts(folder: Path) -> list[Line]:
    """Reads ID.txt, a prompt each."""
    if not folder.is_dir():
        raise UserError(f"--source={folder} is no folder: give dpg_bench/prompts")
    files = sorted(folder.glob("*.txt"))
    return [{"prompt": file.read_text("utf-8").strip(), "item_id": file.stem} for file in files]


def _list(path: Path) -> list[Line]:
    return [{"prompt": row["prompt"], "id": row["id"]} for row in _objects(path)]


def _styles(folder: Path) -> list[Line]:
    """Reads STYLE.json, a list of prompts each."""
    if not folder.is_dir():
        raise UserError(f"--source={folder} is no folder: give HPS' benchmark, with anime.json")
    lists = {file.stem: _objects(file) for file in sorted(folder.glob("*.json"))}
    if not all(isinstance(texts, list) for texts in lists.values()):
        raise TypeError
    return [{"prompt": text, "style": style} for style, texts in lists.items() for text in texts]


def _meta_data(path: Path) -> list[Line]:
    """Reads MJHQ-30K's {ID: {"category", "prompt"}}."""
    return [
        {"prompt": row["prompt"], "id": name, "category": row["category"]}
        for name, row in _objects(path).items()
    ]


def _by_style(lines: Sequence[Line]) -> dict[str, Any]:
    styles = dict.fromkeys(line["style"] for line in lines)
    return {
        f"{style}.json": [line["prompt"] for line in lines if line["style"] == style]
        for style in styles
    }


def _metadata(lines: Sequence[Line]) -> dict[str, Any]:
    return {
        f"pictures/{p:05d}/metadata.jsonl": {name: line[name] for name in GENEVAL if name in line}
        for p, line in enumerate(lines)
    }


BENCHMARKS = {
    "geneval": Benchmark(
        each=4,
        fields=("tag", "include"),
        place=lambda p, j, line, run, before: f"{p:05d}/samples/{j:05d}.png",
        beside=_metadata,
    ),
    "dpg": Benchmark(
        each=4,
        fields=("item_id",),
        place=lambda p, j, line, run, before: f"{line['item_id']}.png",
        grid=True,
        prompts=_texts,
    ),
    "imagereward": Benchmark(
        each=10,
        fields=("id",),
        place=lambda p, j, line, run, before: f"{run}/{line['id']}_{j}.png",
        beside=lambda lines: {
            "prompts.json": [{"id": line["id"], "prompt": line["prompt"]} for line in lines]
        },
        prompts=_list,
    ),
    "hps": Benchmark(
        each=1,
        fields=("style",),
        place=lambda p, j, line, run, before: f"{run}/{line['style']}/{before:05d}.jpg",
        beside=_by_style,
        prompts=_styles,
    ),
}
SOURCES = {name: found.prompts for name, found in BENCHMARKS.items() if found.prompts}
SOURCES["mjhq"] = _meta_data  # whose judge is evaluate --task=fid


def read_prompts(benchmark: str, source: str) -> str:
    """Returns the prompts of a benchmark as the lines that `sample --prompts` reads.

    Raises UserError where the source is not in the benchmark's own form.
    """
    path = Path(source).expanduser()
    try:
        lines = SOURCES[benchmark](path)
        if not all(isinstance(line["prompt"], str) for line in lines):
            raise TypeError
    except UNREACHABLE as error:
        raise UserError(f"--source={source}: {reason_of(error)}") from None
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise UserError(f"--source={source} is not what {benchmark} calls its prompts") from None
    if not lines:
        raise UserError(f"--source={source} holds no prompt")
    return "".join(json.dumps(line) + "\n" for line in lines)
