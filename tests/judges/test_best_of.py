"""The best of N: which are kept, what is written down, and what goes on after a kill."""

import json
import sys

import pytest

from sana_jax.batch.tasks import make_tasks
from sana_jax.judges import best_of, command
from sana_jax.judges.best_of import Choice, choose
from sana_jax.runtime.errors import UserError
from tests import toy_clip
from tests.judges import runs

PROMPTS = [{"prompt": "a cat"}, {"prompt": "two dogs"}]
SCORES = {f"{n:06}_{n}.png": s for n, s in enumerate([1.0, 5.0, 5.0, 2.0, -1.0, -2.0, 0.5, 9.0])}


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    runs.write(tmp_path / "out/candidates", PROMPTS, each=4)
    return tmp_path / "out"


@pytest.fixture
def judge(monkeypatch):
    """A judge that knows SCORES, and the pictures that it was asked about."""
    asked = []

    def judged(line, pictures, says):
        for path, _ in pictures:
            name = path.rpartition("/")[2]
            asked.append(name)
            score = SCORES[name]
            yield ["yes" if score > 0 else "no", score, -score] if says else score

    monkeypatch.setattr(command, "judged", judged)
    return asked


def tasks():
    rows = [("", prompt) for prompt in PROMPTS]
    return make_tasks(rows, {"guidance_scale": 4.5}, 0, 4)


def choice(**changes):
    return Choice(**{"candidates": 4, "keep": 2, "judge": sys.executable} | changes)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_best_are_kept_and_written_down(out, judge):
    names = choose(choice(), tasks(), str(out))
    # Of two that are equal the first comes first.
    assert names == ["000000_1.png", "000001_2.png", "000002_7.png", "000003_6.png"]
    found = lines(out / "manifest.jsonl")
    assert [line["file"] for line in found] == names
    assert [line["candidate"] for line in found][2:] == ["000007_7.png", "000006_6.png"]
    assert [(line["score"], line["rank"]) for line in found] == [(5, 0), (5, 1), (9, 0), (0.5, 1)]
    assert {line["judged_by"] for line in found} == {sys.executable}
    assert {line["file"]: line["answer"] for line in lines(out / "scores.jsonl")} == SCORES
    for line in found:
        expected = (out / "candidates" / line["candidate"]).read_bytes()
        assert (out / line["file"]).read_bytes() == expected
    before = contents(out)
    assert choose(choice(), tasks(), str(out)) == names
    assert contents(out) == before and len(judge) == 8


def test_a_tournament_keeps_the_winners(out, judge):
    names = choose(choice(tournament=True, keep=1), tasks(), str(out))
    assert names == ["000000_2.png", "000001_7.png"]
    assert lines(out / "manifest.jsonl")[0]["score"] == ["yes", 5.0, -5.0]


@pytest.mark.parametrize("kept", [0, 3, 7])
def test_scores_of_a_killed_run_are_not_asked_for_again(out, judge, monkeypatch, kept):
    whole = command.judged

    def killed(*arguments):
        for i, answer in enumerate(whole(*arguments)):
            if i == kept:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(command, "judged", killed)
    with pytest.raises(KeyboardInterrupt):
        choose(choice(), tasks(), str(out))
    assert not (out / "manifest.jsonl").exists()
    with (out / "scores.jsonl").open("a") as file:
        file.write('{"file": "0000')  # torn by a kill
    monkeypatch.setattr(command, "judged", whole)
    judge.clear()
    choose(choice(), tasks(), str(out))
    assert judge == [*SCORES][kept:]
    assert [line["file"] for line in lines(out / "scores.jsonl")] == [*SCORES]
    (out / "000000_1.png").unlink()
    choose(choice(), tasks(), str(out))
    assert (out / "000000_1.png").exists() and len(judge) == 8 - kept


def test_scores_of_another_program_are_not_replaced(out, judge):
    (out / "scores.jsonl").write_text('{"score": 1}\n')
    with pytest.raises(UserError, match="scores.jsonl is not of this program"):
        choose(choice(), tasks(), str(out))
    assert (out / "scores.jsonl").read_text() == '{"score": 1}\n' and judge == []


@pytest.mark.parametrize("count", [7, 9])
def test_scores_of_a_judge_that_miscounts_are_not_kept(out, count):
    line = f"{sys.executable} -c 'print(*range({count}), sep=chr(10))'"
    for _ in range(2):
        with pytest.raises(UserError, match="it print(s more than 8|ed 7) lines"):
            choose(choice(judge=line), tasks(), str(out))
        assert (out / "scores.jsonl").read_text() == ""


def test_a_candidate_that_changed_is_judged_again(out, judge):
    choose(choice(), tasks(), str(out))
    judge.clear()
    found = lines(out / "candidates/manifest.jsonl")
    found[0] |= {"sha256": "0" * 64}  # as drawn by other settings, with --overwrite
    text = "".join(json.dumps(line) + "\n" for line in found)
    (out / "candidates/manifest.jsonl").write_text(text)
    choose(choice(keep=1), tasks(), str(out))
    assert judge == [found[0]["file"]]


def test_fewer_that_are_kept_replace_the_others(out, judge):
    choose(choice(), tasks(), str(out))
    names = choose(choice(keep=1), tasks(), str(out))
    assert sorted(path.name for path in out.glob("*.png")) == names
    assert [line["file"] for line in lines(out / "manifest.jsonl")] == names


def test_what_others_have_chosen_or_drawn_stays_unless_told(out, judge):
    choose(choice(), tasks(), str(out))
    before, other = contents(out), choice(tournament=True, judge="true")
    for refused in best_of.check_out, lambda *given: choose(given[0], tasks(), given[1]):
        with pytest.raises(UserError, match="has chosen; use another folder, or --overwrite"):
            refused(other, str(out))
        with pytest.raises(UserError, match="has chosen by other weights or rules; use another"):
            refused(choice(tournament=True), str(out))
    assert contents(out) == before
    names = choose(other, tasks(), str(out), overwrite=True)
    assert sorted(path.name for path in out.glob("*.png")) == names
    text = (out / "manifest.jsonl").read_text()
    (out / "manifest.jsonl").write_text(text.replace('"candidate"', '"x"'))
    with pytest.raises(UserError, match="were not chosen from candidates"):
        choose(other, tasks(), str(out))
    (out / "manifest.jsonl").unlink()
    (out / names[0]).write_bytes(b"mine")
    with pytest.raises(UserError, match="is of another program"):
        choose(other, tasks(), str(out))
    assert (out / names[0]).read_bytes() == b"mine"


def test_what_clip_chose_with_other_weights_stays(out, tmp_path):
    for name, activation in [("one", "quick_gelu"), ("two", "gelu")]:
        toy_clip.save(tmp_path / name, activation)
    one, two = (choice(judge=best_of.CLIP, weights=str(tmp_path / n)) for n in ("one", "two"))
    choose(one, tasks(), str(out))
    before = contents(out)
    with pytest.raises(UserError, match="'clip' has chosen by other weights or rules"):
        choose(two, tasks(), str(out))
    assert contents(out) == before


def test_clip_scores_are_those_of_evaluate(out, tmp_path):
    toy_clip.save(tmp_path / "clip")
    clip = choice(judge=best_of.CLIP, weights=str(tmp_path / "clip"))
    clip.check()
    choose(clip, tasks(), str(out))
    scores = {line["file"]: line["answer"] for line in lines(out / "scores.jsonl")}
    kept = [line["candidate"] for line in lines(out / "manifest.jsonl")]
    names = sorted(scores)
    for group in names[:4], names[4:]:
        best = sorted(group, key=scores.get, reverse=True)[:2]
        assert kept[:2] == best
        kept = kept[2:]
    from sana_jax.metrics.clip_task import Options, clip_score

    options = Options(str(out / "candidates"), str(tmp_path / "clip"), batch_size=8)
    assert sum(scores.values()) / 8 == pytest.approx(clip_score(options)["clip_score"], rel=1e-9)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(keep=4), "--candidates=4: give more than --num_images_per_prompt=4"),
        (dict(tournament=True, candidates=6), "a tournament is of powers of two"),
        (dict(tournament=True, keep=3), "a tournament is of powers of two"),
        (dict(judge="clip"), "--judge_weights is missing"),
        (dict(judge="clip", tournament=True), "--tournament needs a command"),
        (dict(judge="clip", weights="none"), "none is no folder: give one with CLIP"),
        (dict(weights="x"), "--judge_weights is for --judge=clip"),
        (dict(judge="no-such-program"), "there is no program 'no-such-program'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_drawn(changes, words):
    with pytest.raises(UserError) as error:
        choice(**changes).check()
    assert words in str(error.value)
