"""convert --grow and --prune, and evaluate --task=importance that pruning needs, as commands."""

import json

import jax
import numpy as np
import pytest

from sana_jax.checkpoints import native
from sana_jax.metrics.importance_task import transformer_sha256
from tests import mini
from tests.commands import several
from tests.test_evaluate import environment

MEASURE = "--count=2", "--num_steps=2", "--batch_size=2"


def commands(folder, *lines: str) -> list[tuple[int, str]]:
    """The status of each command line, and what it said on stderr; those of one share a process."""
    answers = []
    for command in ("convert", "evaluate"):
        asked = [line.split()[1:] for line in lines if line.startswith(command)]
        if asked:
            found = several(f"sana_jax.{command}", asked, folder, environment(folder))
            answers += [(status, told) for status, _, told in found]
    return answers


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Checkpoints of four blocks and of two, and the first one's importance."""
    path = tmp_path_factory.mktemp("shared")
    mini.save(path / "four", depth=4)
    mini.save(path / "two", depth=2)
    mini.save(path / "other", depth=4, seed=1)
    native.save(mini.alone(path / "two"), path / "alone")
    flags = ["--task=importance", f"--checkpoint={path / 'four'}", *MEASURE, "--out=four.json"]
    ((status, printed, told),) = several("sana_jax.evaluate", [flags], path, environment(path))
    assert status == 0, told
    (path / "evaluate.txt").write_text(printed)
    return path


def blocks_of(folder):
    return jax.tree.map(np.asarray, native.open_folder(folder).params["dit"]["blocks"])


def test_evaluate_writes_the_importance_that_it_prints(shared):
    written = json.loads((shared / "four.json").read_text())
    *table, last = (shared / "evaluate.txt").read_text().strip().splitlines()
    assert len(written.pop("pictures")) == 2
    assert json.loads(last) == written
    assert written["task"] == "importance" and len(written["importance"]) == 4
    assert written["sha256"] == transformer_sha256(native.open_folder(shared / "four"))
    ranks = [line.split()[2] for line in table[-4:]]
    assert sorted(ranks) == list("1234")


def test_pruned_and_grown_folders_hold_the_blocks_and_say_so(shared, tmp_path):
    four = shared / "four"
    answers = commands(
        tmp_path,
        f"convert --source={four} --out=pruned --prune=2 --importance={shared / 'four.json'}",
        f"convert --source={four} --out=grown --grow=6 --seed=5",
        f"convert --source={four} --out=longer --grow=5 --keep=4",
        "convert --source=grown --out=theirs --format=diffusers",
    )
    assert [status for status, _ in answers] == [0] * 4, answers
    importance = json.loads((shared / "four.json").read_text())["importance"]
    kept = sorted(np.argsort(importance)[-2:].tolist())
    sha256 = transformer_sha256(native.open_folder(four))
    before = blocks_of(four)
    about = {"source": "four", "sha256": sha256}
    expected = {
        "pruned": (kept, {"pruned": 2, "from": 4, "kept": kept, "importance": importance}),
        "grown": ([0, 1], {"grown": 6, "from": 4, "kept": 2, "seed": 5}),
        "longer": ([0, 1, 2, 3], {"grown": 5, "from": 4, "kept": 4, "seed": 0}),
    }
    for name, (rows, told) in expected.items():
        model = json.loads((tmp_path / name / "model.json").read_text())
        assert model["provenance"]["depth"] == [told | about]
        assert model["provenance"]["source"] == "random weights, preset tiny, seed 0"
        now = blocks_of(tmp_path / name)
        depth = model["dit"]["depth"]
        assert {len(x) for x in jax.tree.leaves(now)} == {depth} == {told.get(name, 5)}
        for new, old in zip(jax.tree.leaves(now), jax.tree.leaves(before), strict=True):
            np.testing.assert_array_equal(new[: len(rows)], old[rows])
    config = json.loads((tmp_path / "theirs" / "transformer" / "config.json").read_text())
    assert config["num_layers"] == 6


def test_bad_flags_are_one_line_and_write_nothing(shared, tmp_path):
    four = f"convert --source={shared / 'four'} --out=out"
    file = f"--importance={shared / 'four.json'}"
    (tmp_path / "torn.json").write_text('{"task": "importance", "importance": [0.1')
    measure = f"evaluate --task=importance --checkpoint={shared / 'four'} " + " ".join(MEASURE)
    cases = {
        f"{four} --prune=2": "--prune needs --importance=FILE: evaluate --task=importance",
        f"{four} --prune=2 --importance=no.json": "no.json is missing",
        f"{four} --prune=2 --importance=torn.json": "torn.json is not JSON",
        f"{four} --prune=2 --importance={shared / 'four' / 'model.json'}": "no file that evaluate",
        f"{four} --prune=4 {file}": "--prune=4: --source has 4 blocks; give 1 to 3",
        f"{four} --prune=5 {file}": "--prune=5: --source has 4 blocks",
        f"{four} --prune=0 {file}": "--prune=0: --source has 4 blocks",
        f"{four} --prune=two {file}": "--prune",
        f"{four} {file}": "--importance is for --prune, which is not given",
        f"{four} --grow=6 --prune=2 {file}": "--grow and --prune are two steps",
        f"{four} --grow=4": "--grow=4: --source has 4 blocks; give 5 to 1000",
        f"{four} --grow=3": "or fewer by --prune",
        f"{four} --grow=1001": "give 5 to 1000",
        f"{four} --grow=6 --keep=5": "--keep=5: --source has 4 blocks",
        f"{four} --grow=6 --keep=0": "--keep=0: --source has 4 blocks",
        f"{four} --keep=2": "--keep is for --grow, which is not given",
        f"{four} --seed=2": "--seed is for --grow, which is not given",
        f"{four} --grow=6 --format=diffusers": "--grow writes the native layout",
        f"{four} --prune=2 {file} --format=diffusers": "--prune writes the native layout",
        f"convert --source={shared / 'two'} --out=out --prune=1 {file}": "of 4 blocks, and",
        f"convert --source={shared / 'other'} --out=out --prune=1 {file}": "is of other weights",
        f"convert --source={shared / 'two'} --out=out --grow=4": "say how many stay by --keep",
        f"convert --source={shared / 'alone'} --out=out --grow=4": "--grow is for a checkpoint",
        f"{measure} --out=importance.png": "ends with .json",
        f"{measure} --out=no/importance.json": "make it first",
        f"{measure} --prompts=none.txt": "none.txt",
        f"{measure} --prompts=torn.json": "give a .txt file",
        f"{measure} --size=64": "--size is not of --task=importance",
        f"evaluate --task=importance --checkpoint={shared / 'alone'}": "lacks dit",
        f"evaluate --task=shapes --checkpoint={shared / 'four'} --prompts=a.txt": "--prompts is",
    }
    before = sorted(tmp_path.rglob("*"))
    answers = commands(tmp_path, *cases)
    for (line, words), (status, told) in zip(cases.items(), answers, strict=True):
        assert status == 2, (line, told)
        assert told.startswith("error: ") and told.count("\n") == 1, (line, told)
        assert words in told, (words, told)
    assert [path for path in sorted(tmp_path.rglob("*")) if "caches" not in path.parts] == before
