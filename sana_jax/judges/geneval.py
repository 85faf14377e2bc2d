"""GenEval's verdicts on detected objects (arXiv 2310.11513), without the detector.

The rules are those of evaluation/evaluate_images.py in djghosh13/geneval with its own settings. A
picture is right if every object that its prompt includes is there so often, with the colour and the
position that are asked for, and none that it excludes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import UNREACHABLE, check_is_file, parse_json, reason_of

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # of confidence; the second where objects are counted
MOST = 16  # objects of a class
APART = 0.1  # of both objects' sides that their centres have to be apart, to have a position
LEANING = 0.5  # of the distance between the centres, along an axis

Found = dict[str, Any]  # class, box (x0, y0, x1, y1 in pixels), score, and perhaps color
Objects = Mapping[str, Sequence[Found]]


def objects(found: Sequence[Found], tag: str) -> dict[str, list[Found]]:
    """Returns the detections that count, by class, the surest first."""
    least = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    kept: dict[str, list[Found]] = {}
    for each in sorted(reversed(found), key=lambda each: -each["score"]):
        group = kept.setdefault(each["class"], [])
        if each["score"] > least and len(group) < MOST:
            group.append(each)
    return {name: group for name, group in kept.items() if group}


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Returns where the first box is of the second: "left of", "right of", "above", "below"."""
    offset, apart = [], []
    for axis in (0, 1):
        low, high, other_low, other_high = box[axis], box[axis + 2], other[axis], other[axis + 2]
        between = (low + high) / 2 - (other_low + other_high) / 2
        room = APART * (abs(high - low) + abs(other_high - other_low))
        offset.append(between)
        apart.append(math.copysign(max(abs(between) - room, 0), between))
    if max(map(abs, apart)) < 1e-3:
        return set()
    dx, dy = (x / math.hypot(*offset) for x in apart)
    sides = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
    return {name for name, lean in sides.items() if lean > LEANING}


def verdict(there: Objects, wanted: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Returns whether a picture is right, and what is wrong with it.

    Only the surest objects are looked at, as many as are asked for. A group that fails leaves no
    target for a position. Raises KeyError where an object has no colour that is asked for.
    """
    wrong: list[str] = []
    groups: list[Sequence[Found] | None] = []
    for one in wanted.get("include", ()):
        name, count = one["class"], one["count"]
        group = there.get(name, ())[:count]
        told = _wrong(one, group, groups)
        wrong += [told] if told else []
        groups.append(None if told else group)
    for one in wanted.get("exclude", ()):
        name, count = one["class"], one["count"]
        if len(there.get(name, ())) >= count:
            wrong.append(f"expected {name}<{count}, found {len(there[name])}")
    return not wrong, wrong


def _wrong(one: Mapping[str, Any], group: Sequence[Found], groups: Sequence) -> str | None:
    """Returns what is wrong with a group of objects of one class, or None."""
    name, count = one["class"], one["count"]
    if len(group) < count:
        return f"expected {name}>={count}, found {len(group)}"
    if "color" in one:
        right = sum(each["color"] == one["color"] for each in group)
        if right < count:
            return f"expected {one['color']} {name}>={count}, found {right}"
    if "position" in one:
        relation, target = one["position"]
        if groups[target] is None:
            return f"no target for {name} to be {relation}"
        for each in group:
            for other in groups[target]:
                found = relations(each["box"], other["box"])
                if relation not in found:
                    told = " and ".join(sorted(found)) or "no side of"
                    return f"expected {name} {relation} target, found {told} target"
    return None


def judge(folder: str, detections: str) -> list[dict[str, Any]]:
    """Returns GenEval's results of the pictures in a layout, a row each.

    Args:
      folder: of --task=pictures; its pictures/00000/metadata.jsonl says what is wanted.
      detections: a .jsonl file, a line a picture: {"filename": "00000/samples/00000.png",
        "detections": [{"class": "dog", "box": [x0, y0, x1, y1], "score": 0.9, "color": "brown"}]}.

    Raises UserError, naming the line, and where a picture has none.
    """
    root = Path(folder).expanduser() / "pictures"
    due = {path.relative_to(root).as_posix() for path in root.glob("*/samples/*.png")}
    if not due:
        raise UserError(f"--data={folder} has no pictures in GenEval's layout (--task=pictures)")
    rows = []
    for where, row in read_lines(detections, "--detections="):
        try:
            name, found = row["filename"], row["detections"]
            if name not in due:
                raise UserError(f"{where}{name!r:.80} is no picture of --data, or there twice")
            due.remove(name)
            metadata = parse_json((root / name).parents[1].joinpath("metadata.jsonl").read_bytes())
            there = objects(found, metadata["tag"])
            correct, wrong = verdict(there, metadata)
            rows.append(
                {
                    "filename": name,
                    "tag": metadata["tag"],
                    "prompt": metadata["prompt"],
                    "correct": correct,
                    "reason": "\n".join(wrong),
                    "metadata": json.dumps(metadata),
                    "details": json.dumps({k: [x["box"] for x in v] for k, v in there.items()}),
                }
            )
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"{where}it is not of the form that --help shows: {error!r}") from None
        except UNREACHABLE as error:
            raise UserError(f"--data={folder}: {name}: {reason_of(error)}") from None
    if due:
        raise UserError(f"{detections} has no line for {len(due)} pictures, such as {min(due)}")
    return rows


def read_lines(path: str, flag: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns the objects of a .jsonl file, with the beginning of complaints about each."""
    file = Path(path).expanduser()
    check_is_file(file, f"{flag}{path}")
    rows = []
    try:
        for number, text in enumerate(file.read_bytes().splitlines(), 1):
            if not text.strip():
                continue
            row = parse_json(text)
            if not isinstance(row, dict):
                raise ValueError("it is no object")
            rows.append((f"{path} line {number}: ", row))
    except UNREACHABLE as error:
        raise UserError(f"{flag}{path}: {reason_of(error)}") from None
    except ValueError as error:
        raise UserError(f"{path} line {number}: it is not JSON ({error})") from None
    if not rows:
        raise UserError(f"{flag}{path} is empty")
    return rows
