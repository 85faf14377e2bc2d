"""Best of N: candidates of each prompt, a judge's scores of them, and the ones that are kept.

OUT/candidates is a batch run of N pictures of every prompt. OUT/scores.jsonl has a line for each
candidate as soon as it is judged, and OUT itself is a batch run of the pictures that were chosen,
whose manifest says of which candidate each is, and how it scored. All three go on where a killed
command was.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from etils import epath

from sana_jax.batch.manifest import Line, Manifest, key_of
from sana_jax.batch.tasks import Task
from sana_jax.judges import command, tournament
from sana_jax.runtime.errors import UserError
from sana_jax.runtime.files import local, storage, write_atomically
from sana_jax.runtime.lock import locked
from sana_jax.runtime.progress import Progress

CANDIDATES = "candidates"  # the folder of all pictures
CLIP = "clip"


@dataclasses.dataclass(frozen=True)
class Choice:
    """How pictures are chosen, named like the flags of sample.py."""

    candidates: int  # of a prompt
    keep: int  # of them
    judge: str  # CLIP, or a command (judges/command.py)
    weights: str | None = None  # of CLIP, a folder
    tournament: bool = False  # by the SANA-1.5 paper's rules (judges/tournament.py)
    batch_size: int = 8  # pictures that CLIP reads at once

    def check(self) -> None:
        """Raises UserError for what can be seen before a picture is drawn."""
        n, keep = self.candidates, self.keep
        if not 1 <= keep < n:
            raise UserError(
                f"--candidates={n}: give more than --num_images_per_prompt={keep}, which are kept"
            )
        if self.tournament and (n & (n - 1) or keep & (keep - 1)):
            raise UserError(
                f"--candidates={n}, --num_images_per_prompt={keep}: a tournament is of powers of"
                " two, and leaves a power of two"
            )
        if self.judge != CLIP:
            command.check(self.judge)
            if self.weights is not None:
                raise UserError("--judge_weights is for --judge=clip; leave it out")
            return
        if self.tournament:
            raise UserError("--tournament needs a command that says yes or no; clip has scores")
        if self.weights is None:
            raise UserError("--judge_weights is missing: a folder of CLIP, as for evaluate")
        from sana_jax.checkpoints.clip import open_clip  # jax: errors above need not wait for it

        open_clip(self.weights)

    @cached_property
    def key(self) -> str:
        """A hash of what decides a candidate's score: judge, CLIP's weights, kind of answer."""
        weights = None
        if self.judge == CLIP:
            from sana_jax.checkpoints.clip import open_clip

            weights = open_clip(self.weights).sha256()
        return key_of({"judge": self.judge, "weights": weights, "yes": self.tournament})


def check_out(choice: Choice, out: str, overwrite: bool = False) -> None:
    """Raises UserError for a folder that will not take the chosen, before candidates are drawn."""
    folder = epath.Path(local(out))
    with storage(folder):
        _check_others(folder, Manifest(folder / "manifest.jsonl"), choice, overwrite)


def choose(choice: Choice, tasks: Sequence[Task], out: str, overwrite: bool = False) -> list[str]:
    """Judges the candidates of `tasks`, which are drawn, and returns the names of the chosen.

    Raises UserError, and Retry if the disk fails.
    """
    folder = epath.Path(local(out))
    with storage(folder), locked(folder):
        drawn = Manifest(folder / CANDIDATES / "manifest.jsonl").lines
        lines = [drawn[task.file] for task in tasks]
        chosen = Manifest(folder / "manifest.jsonl")
        _check_others(folder, chosen, choice, overwrite)
        answers = _answers(choice, lines, folder)
        wanted = [
            made
            for start in range(0, len(lines), choice.candidates)
            for made in _keep(choice, lines[start : start + choice.candidates], answers)
        ]
        for number, line in enumerate(wanted):
            source = line["candidate"]
            line["file"] = f"{number:06d}_{source.partition('_')[2]}"
        names = [line["file"] for line in wanted]
        due = [line for line in wanted if not _is_there(folder, line)]
        for name in [line["file"] for line in due]:
            if (folder / name).exists() and name not in chosen.lines and not overwrite:
                raise UserError(f"{folder / name} is of another program; use another --out")
        numbers = {name.partition("_")[0] for name in names}
        ours = {line["file"] for line in lines}
        for name, line in [*chosen.lines.items()]:  # another choice from the same candidates
            is_old = name.partition("_")[0] in numbers or line.get("candidate") in ours
            if name not in names and is_old:
                (folder / name).unlink(missing_ok=True)
                del chosen.lines[name]
        for line in due:
            content = (folder / CANDIDATES / line["candidate"]).read_bytes()
            write_atomically(folder / line["file"], content)
        chosen.lines |= {line["file"]: line for line in wanted}
        chosen.sort()
    return names


def _check_others(folder: epath.Path, chosen: Manifest, choice: Choice, overwrite: bool) -> None:
    for line in chosen.lines.values():
        if "candidate" not in line and not overwrite:
            raise UserError(
                f"--out={folder} has pictures that were not chosen from candidates; use another"
                " folder, or --overwrite to replace them"
            )
        judge = line.get("judged_by")
        same = judge == choice.judge and line.get("judge_key", choice.key) == choice.key
        if not same and not overwrite:
            how = " by other weights or rules" if judge == choice.judge else ""
            raise UserError(
                f"--out={folder} has pictures that {judge!r} has chosen{how}; use another folder,"
                " or --overwrite to replace them"
            )
    if chosen.strange:
        raise UserError(f"{folder / 'manifest.jsonl'} is not of this program; use another --out")


def _is_there(folder: epath.Path, line: Line) -> bool:
    path = folder / line["file"]
    return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == line["sha256"]


def _keep(choice: Choice, lines: Sequence[Line], answers: dict[str, Any]) -> list[Line]:
    """Returns the lines of the chosen of one prompt's candidates, the best first."""
    found = [answers[line["file"]] for line in lines]
    if choice.tournament:
        kept = tournament.winners(found, choice.keep)
    else:  # the first of those that are equal
        kept = sorted(range(len(found)), key=lambda i: -found[i])[: choice.keep]
    about = {"judged_by": choice.judge, "judge_key": choice.key, "candidates": choice.candidates}
    return [
        {**lines[i], "candidate": lines[i]["file"], "score": found[i], "rank": rank} | about
        for rank, i in enumerate(kept)
    ]


def _answers(choice: Choice, lines: list[Line], folder: epath.Path) -> dict[str, Any]:
    """Returns the judge's answer for every candidate, those in scores.jsonl and the others."""
    scores = Manifest(folder / "scores.jsonl")
    if scores.strange and not scores.lines:
        raise UserError(f"{folder / 'scores.jsonl'} is not of this program; use another --out")
    done = {
        line["file"]: line["answer"]
        for line in scores.lines.values()
        if line["key"] == choice.key and "answer" in line
    }
    due = [
        line
        for line in lines
        if scores.lines.get(line["file"], line)["sha256"] != line["sha256"]
        or line["file"] not in done
    ]
    scores.tidy()  # a torn last line
    before = dict(scores.lines)
    if due:
        with Progress(len(lines), "candidate", "judging", initial=len(lines) - len(due)) as bar:
            try:
                for line, answer in zip(due, _judged(choice, due, folder), strict=True):
                    own = {"file": line["file"], "key": choice.key, "sha256": line["sha256"]}
                    scores.append(own | {"judged_by": choice.judge, "answer": answer})
                    done[line["file"]] = answer
                    bar.update()
            except command.WrongCount:  # a second run would take them for right
                scores.lines = before
                scores.tidy()
                raise
    scores.sort()
    return done


def _judged(choice: Choice, due: list[Line], folder: epath.Path) -> Iterator[Any]:
    root = folder / CANDIDATES
    if choice.judge != CLIP:
        pictures = [(str(root / line["file"]), line["prompt"]) for line in due]
        return command.judged(choice.judge, pictures, choice.tournament)
    from sana_jax.metrics import clip_task

    options = clip_task.Options(
        str(root), choice.weights, batch_size=choice.batch_size, workdir=str(folder / CLIP)
    )
    found, features, _ = clip_task.score_pictures(options)
    if features.counts.used < features.counts.read:
        raise UserError(f"--judge=clip: {features.counts}; for example {features.counts.examples}")
    names = sorted(Manifest(root / "manifest.jsonl").lines)
    by_name = dict(zip(names, found.tolist(), strict=True))
    return iter([by_name[line["file"]] for line in due])
