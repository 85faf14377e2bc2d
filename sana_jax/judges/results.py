"""The result files of the judges, read into figures of one form.

    geneval      results.jsonl of evaluate_images.py, or of --task=geneval: a row a picture
    dpg          dpg-bench_..._results.txt: a line a grid, its pictures' scores and their mean
    imagereward  ImageReward-v1.0-benchmark-NAME-result.json: an object a prompt
    hps          the lines that hpsv2's evaluation prints, in a file: a style each

Overall figures are formed anew from the rows as the judges form them: a summary that a judge has
written beside them is not believed, so that a run that lost rows cannot look whole.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from sana_jax.judges.geneval import read_lines
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import UNREACHABLE, check_is_file, parse_json, reason_of

Figures = dict[str, Any]  # overall, pictures, prompts, and parts by name
NUMBER = r"\d+(?:\.\d+)?"
HPS = re.compile(
    rf"(?P<model>.+?)\s+(?P<style>[\w-]+)\s+(?P<score>-?{NUMBER})\s+(?P<spread>{NUMBER})"
)


def geneval(path: str) -> Figures:
    """Returns the mean over tasks of the share of right pictures, which is GenEval's figure."""
    tasks: dict[str, list[bool]] = defaultdict(list)
    prompts: dict[str, list[bool]] = defaultdict(list)
    for where, row in read_lines(path, "geneval:"):
        tag, correct, metadata = (row.get(name) for name in ("tag", "correct", "metadata"))
        if not isinstance(tag, str) or correct not in (True, False):
            raise UserError(f"{where}it has no tag, or its correct is neither true nor false")
        tasks[tag].append(bool(correct))
        prompts[json.dumps(metadata)].append(bool(correct))
    parts = {tag: fmean(found) for tag, found in tasks.items()}
    return {
        "overall": fmean(parts.values()),
        "parts": parts,
        "pictures": sum(map(len, tasks.values())),
        "prompts": len(prompts),
        "right_prompts": fmean(map(any, prompts.values())),
    }


def dpg(path: str) -> Figures:
    """Returns the mean over grids, in per cent as the judge prints it."""
    scores = []
    for line in _text(path, "dpg:").splitlines():
        # The path may have commas of its own.
        numbers = re.search(rf"\.\w+((?:, {NUMBER})+)$", line)
        if numbers:
            *each, mean = map(float, numbers[1].removeprefix(", ").split(", "))
            if not each or not math.isclose(fmean(each), mean, abs_tol=1e-6):
                raise UserError(f"{path}: the mean of {line!r:.80} is not that of its scores")
            scores.append(each)
    if not scores:
        raise UserError(f"dpg:{path} has no line of a grid, such as 'A/0.png, 1.0, 0.5, 0.75'")
    return {
        "overall": 100 * fmean(map(fmean, scores)),
        "parts": {},
        "pictures": sum(map(len, scores)),
        "prompts": len(scores),
    }


def imagereward(path: str) -> Figures:
    """Returns the mean over prompts of the mean over their pictures."""
    text = _text(path, "imagereward:")
    try:
        rows = parse_json(text)
        rewards = [[float(reward) for reward in row["rewards"]] for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"imagereward:{path} is no list of rewards: {error!r}") from None
    if not rewards or not all(rewards) or not all(map(math.isfinite, sum(rewards, []))):
        raise UserError(
            f"imagereward:{path} has a prompt without a reward, or one that is no number"
        )
    return {
        "overall": fmean(map(fmean, rewards)),
        "parts": {},
        "pictures": sum(map(len, rewards)),
        "prompts": len(rewards),
    }


def hps(path: str) -> Figures:
    """Returns the mean over styles."""
    found = map(HPS.fullmatch, map(str.strip, _text(path, "hps:").splitlines()))
    parts: dict[str, float] = {}
    models = set()
    for line in filter(None, found):
        if line["style"] in parts:
            raise UserError(f"hps:{path} has style {line['style']} twice: give one model's lines")
        parts[line["style"]] = float(line["score"])
        models.add(line["model"])
    if not parts or len(models) > 1:
        raise UserError(
            f"hps:{path} has not the lines of one model, such as 'RUN  anime  27.1  0.2'"
        )
    return {"overall": fmean(parts.values()), "parts": parts, "pictures": None, "prompts": None}


READERS: Mapping[str, Callable[[str], Figures]] = {
    "geneval": geneval,
    "dpg": dpg,
    "imagereward": imagereward,
    "hps": hps,
}


def read(named: str) -> tuple[str, Figures]:
    """Reads one value of --results, BENCHMARK:FILE. Raises UserError."""
    kind, _, path = named.partition(":")
    if kind not in READERS or not path:
        raise UserError(f"--results={named}: give BENCHMARK:FILE, of {', '.join(READERS)}")
    return kind, READERS[kind](path)


def table(found: Mapping[str, Figures]) -> str:
    """Formats the figures for people."""
    lines = [f"{'':24}{'figure':>10}{'pictures':>10}{'prompts':>9}"]
    for kind, figures in found.items():
        counts = (
            "-" if figures[name] is None else figures[name] for name in ("pictures", "prompts")
        )
        lines.append("{:24}{:10.4f}{:>10}{:>9}".format(kind, figures["overall"], *counts))
        lines += [f"  {name:22}{value:10.4f}" for name, value in figures["parts"].items()]
    return "\n".join(lines)


def _text(path: str, flag: str) -> str:
    file = Path(path).expanduser()
    try:
        check_is_file(file, f"{flag}{path}")
        return file.read_text("utf-8")
    except UNREACHABLE as error:
        raise UserError(f"{flag}{path}: {reason_of(error)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{flag}{path} is not UTF-8 text") from None
