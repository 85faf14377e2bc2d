"""Chooses the caption of an image for a batch: by place, by style, or by alignment score.

With scores c_i in points, 0 .. 100 as CLIP scores are given, and a temperature tau, caption i is
drawn with a probability proportional to

    score     c_i^(1 / max(tau, 0.01)) over captions with c_i >= threshold; if there is none, the
              best caption is taken (SANA's code: threshold 25, tau 0.1)
    softmax   exp(c_i / tau) over all captions (arXiv 2410.10629, section 2.3)

`score` at tau 0.1 takes 28 twice as often as 26; `softmax` does so at tau 3. Whatever the kind, a
picture none of whose captions has `drop_below` points is not used (SANA's del_img_clip_thr: 22).
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from sana_jax.data.images import BadImage
from sana_jax.data.records import Record
from sana_jax.runtime.errors import UserError

KINDS = ("first", "uniform", "score", "softmax", "proportion")


@dataclasses.dataclass(frozen=True)
class CaptionChoice:
    """Draws the number of a caption.

    Attributes:
      kind: one of KINDS.
      temperature, threshold: in points, whatever unit the data's scores have.
      full_score: the data's score for 100 points: 100, or 1 if scores are cosines.
      drop_below: in points; 0: no picture is left out for its scores.
      proportions: for "proportion", the weight of each caption by its number, or by its style if
        the record's `truth` names one: {"captions": [{"style": "short"}, ...]}.
    """

    kind: str = "first"
    temperature: float = 0.1
    threshold: float = 25.0
    full_score: float = 100.0
    drop_below: float = 0.0
    proportions: Mapping[int | str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"kind={self.kind!r}: it takes {', '.join(KINDS)}")
        for name in "temperature", "full_score":
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)}: give a number above 0")
        if not 0 <= self.drop_below <= 100:
            raise UserError(f"drop_below={self.drop_below}: give 0 to 100 points")
        weights = list(self.proportions.values())
        if self.kind == "proportion" and (not sum(weights) or min(weights) < 0):
            raise UserError(
                f"proportions={dict(self.proportions)}: give weights of at least 0,"
                " such as {'short': 0.3, 'long': 0.7}"
            )

    @property
    def settings(self) -> dict[str, Any]:
        used = {
            "score": ("temperature", "threshold", "full_score"),
            "softmax": ("temperature", "full_score"),
            "proportion": ("proportions",),
        }
        dropping = ("full_score", "drop_below") if self.drop_below else ()
        names = dict.fromkeys((*used.get(self.kind, ()), *dropping))
        values = {name: getattr(self, name) for name in names}
        if "proportions" in values:  # JSON has texts for keys
            values["proportions"] = {str(k): v for k, v in self.proportions.items()}
        return {"kind": self.kind} | values

    def __call__(self, record: Record, rng: np.random.Generator) -> int:
        """Returns the number of a caption. Raises BadImage if there is none to choose."""
        probabilities = self.probabilities(record)
        return int(rng.choice(len(probabilities), p=probabilities))

    def probabilities(self, record: Record) -> Float[np.ndarray, " captions"]:
        """Returns the probability of each caption, 0 for empty ones."""
        there = np.array([bool(caption.strip()) for caption in record["captions"]], float)
        if not there.any():
            raise BadImage("bad_caption", "it has no caption")
        if self.drop_below:
            best = np.where(there, self._points(record), -np.inf).max()
            if best < self.drop_below:
                raise BadImage("low_score", f"its best caption has {best:.2f} points")
        if self.kind == "first":
            weights = np.arange(len(there)) == np.argmax(there)
        elif self.kind == "proportion":
            weights = self._proportions(record) * there
            if not weights.any():
                raise BadImage("bad_caption", "none of its captions has a part in the proportions")
        elif self.kind == "uniform" or there.sum() == 1:
            weights = there
        else:
            weights = self._by_score(self._points(record), there)
        return weights / weights.sum()

    def _by_score(self, points: np.ndarray, there: np.ndarray) -> np.ndarray:
        points = np.where(there, points, -np.inf)
        best = np.arange(len(points)) == np.argmax(points)
        if self.kind == "softmax":
            return np.exp((points - points.max()) / self.temperature)
        good = points >= max(self.threshold, 0)
        if not good.any() or points.max() <= 0:
            return best
        # Over the best, or small temperatures would overflow.
        share = np.where(good, points, 0) / points.max()
        return share ** (1 / max(self.temperature, 0.01))

    def _points(self, record: Record) -> np.ndarray:
        scores, count = np.array(record["scores"], float), len(record["captions"])
        if len(scores) != count:
            why = f"{len(scores)} scores for {count} captions; choose by another name than"
            kind = self.kind if self.kind in ("score", "softmax") else "drop_below"
            raise BadImage("bad_caption", f"{why} {kind}")
        points = scores * (100 / self.full_score)
        if not np.isfinite(points).all() or points.max() > 100:
            raise BadImage(
                "bad_caption", f"scores {scores.tolist()}, where full_score={self.full_score}"
            )
        return points

    def _proportions(self, record: Record) -> np.ndarray:
        weights = {str(key): weight for key, weight in self.proportions.items()}
        styles = _styles(record["truth"])
        styles += [""] * (len(record["captions"]) - len(styles))
        return np.array(
            [
                weights.get(str(i), weights.get(styles[i], 0.0))
                for i in range(len(record["captions"]))
            ]
        )


def _styles(truth: str) -> list[str]:
    """Returns the captions' styles that a record's `truth` names."""
    try:
        return [str(caption["style"]) for caption in json.loads(truth)["captions"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
