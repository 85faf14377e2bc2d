"""The command as a user meets it."""

import json
import os
from pathlib import Path

from tests import commands
from tests.judges import runs

ROOT = Path(__file__).parents[1]
CAT = {"prompt": "a cat", "tag": "single_object", "include": [{"class": "cat", "count": 1}]}


def several(lines, cwd):
    return commands.several("sana_jax.judge", lines, cwd, os.environ | dict(PYTHONPATH=str(ROOT)))


def test_from_a_run_to_a_table(tmp_path):
    runs.write(tmp_path / "run", [CAT], each=4)
    seen = {"class": "cat", "box": [0, 0, 1, 1], "score": 0.9}
    rows = [
        {"filename": f"00000/samples/{j:05}.png", "detections": [seen] if j else []}
        for j in range(4)
    ]
    (tmp_path / "found.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "ir.json").write_text('[{"id": "a", "prompt": "a cat"}]')
    lines = [
        ["--task=pictures", "--benchmark=geneval", "--data=run", "--out=layout"],
        ["--task=geneval", "--data=layout", "--detections=found.jsonl", "--out=results.jsonl"],
        ["--task=table", "--results=geneval:results.jsonl"],
        ["--task=prompts", "--benchmark=imagereward", "--source=ir.json", "--out=ir.jsonl"],
    ]
    answers = several(lines, tmp_path)
    assert [status for status, _, _ in answers] == [0] * 4, answers
    assert answers[0][1] == "pictures of 1 prompts in layout/pictures\n"
    assert answers[3][1] == "1 prompts in ir.jsonl\n"
    for _, out, _ in answers[1:3]:
        assert json.loads(out.splitlines()[-1])["geneval"]["overall"] == 0.75
    assert json.loads((tmp_path / "ir.jsonl").read_text()) == {"prompt": "a cat", "id": "a"}


def test_bad_input_is_one_line_and_writes_nothing(tmp_path):
    runs.write(tmp_path / "run", [CAT], each=4)
    (tmp_path / "ir.json").write_text("[]")
    prompts = ["--task=prompts", "--benchmark=imagereward", "--source=ir.json"]
    (tmp_path / "same.jsonl").write_text('[{"id": "a", "prompt": "a cat"}]')
    same = prompts[:2]
    pictures = ["--task=pictures", "--data=run", "--out=out"]
    cases = {
        "--task": [],
        "--task=paint": ["--task=paint"],
        "--benchmark is missing": pictures,
        "--benchmark=clip": [*pictures, "--benchmark=clip"],
        "--benchmark=mjhq: its judge": [*pictures, "--benchmark=mjhq"],
        "--source is not of --task=pictures": [*pictures, "--benchmark=dpg", "--source=x"],
        "has no item_id": [*pictures, "--benchmark=dpg"],
        "--each": [*pictures, "--benchmark=geneval", "--each=0"],
        "--out is missing": prompts,
        "holds no prompt": [*prompts, "--out=out.jsonl"],
        "--benchmark=geneval: `sample` reads": [*prompts, "--benchmark=geneval", "--out=o.jsonl"],
        "same.jsonl is the file that is read": [*same, "--source=same.jsonl", "--out=same.jsonl"],
        "--results is missing": ["--task=table"],
        "--results=x: give BENCHMARK:FILE": ["--task=table", "--results=x"],
        "hps:none: No such file": ["--task=table", "--results=hps:none"],
    }
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    answers = several(list(cases.values()), tmp_path)
    for (words, line), (status, _, told) in zip(cases.items(), answers, strict=True):
        assert status == 2 and told.count("\n") == 1 and words in told, (line, told)
    after = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert after == before
