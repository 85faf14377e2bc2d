"""Runs are found and read wherever they lie and however they ended."""

import json

import pytest

from sana_jax.pages import report
from sana_jax.pages.runs import find, shown
from sana_jax.runtime.errors import UserError
from tests.pages import made


def test_names_tell_runs_of_a_sweep_and_of_several_folders_apart(tmp_path):
    for name in "base/seed_0", "base/seed_1/low", "lr=1e-3":
        made.run(tmp_path / "sweep" / name, [{"step": 1}])
    made.run(tmp_path / "sweep/lr=1e-3/model/not_a_run", [{"step": 1}])
    made.run(tmp_path / "other", [{"step": 1}])
    runs = find([str(tmp_path / "sweep")])
    assert [run.name for run in runs] == ["base/seed_0", "base/seed_1/low", "lr=1e-3"]
    assert [run.group for run in runs] == ["base", "base/low", "lr=1e-3"]
    assert [run.name for run in find([str(tmp_path / "other")])] == ["other"]
    both = find([f"{tmp_path}/sweep/base/", str(tmp_path / "other"), f"{tmp_path}/other/"])
    names = ["base/seed_0", "base/seed_1/low", f"{tmp_path}/other"]
    assert [run.name for run in both] == names


def test_the_newest_whole_checkpoint_has_the_config(tmp_path):
    config = {"recipe": {"steps": 9}, "images": {"prompts": ["a", "b"]}, "data": {"caption": None}}
    folder = made.run(tmp_path / "run", config=config, checkpoints=(4, 8))
    damaged = folder / "checkpoints/8/run/metadata"
    damaged.write_text(damaged.read_text().replace('"steps": 9', '"steps": 7'))
    (folder / "checkpoints/12").mkdir()
    (run,) = find([str(folder)])
    assert run.config == {"recipe.steps": 9, "images.prompts": ["a", "b"], "data.caption": None}
    assert (run.steps, run.prompts, run.checkpoints, run.last_step) == (
        9,
        ["a", "b"],
        [4, 8, 12],
        12,
    )
    assert [shown(value) for value in ("a", None, ["b"], 1e-3)] == ["a", "null", '["b"]', "0.001"]


def test_a_run_that_has_hardly_begun_has_nothing_and_is_no_error(tmp_path):
    (run,) = find([str(made.run(tmp_path / "run", ['{"step": 1, "lo']))])
    assert (run.rows, run.config, run.steps, run.last_step) == ([], {}, None, 0)
    assert run.pictures() == run.evaluations() == {} and run.prompts == []


def test_figures_of_evaluate_and_of_a_phase_have_their_steps(tmp_path):
    folder = made.run(tmp_path / "run", [{"step": 6}])
    figures = {"128": {"psnr": 20.5, "rejected": {}}}
    results = {"steps": 6, "before": figures, "after": {"128": {"psnr": 30.5}}, "about": {"a": 1}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "evaluations").mkdir()
    line = {"task": "fid", "fid": 12.5, "kid": float("nan"), "size": None, "jpeg": True}
    for name, text in {
        "fid_00000004.txt": f"a table\n{json.dumps(line)}\n",
        "fid_clean_4.txt": json.dumps(line | {"fid": 8.5}),
        "last.json": json.dumps(line),
        "cut_5.txt": json.dumps(line)[:-9],
        "empty_6.txt": "",
        "other_7.txt": "[1]",
    }.items():
        (folder / "evaluations" / name).write_text(text)
    (run,) = find([str(folder)])
    fid = {"fid: fid": 12.5}
    found, both = run.evaluations(), fid | {"fid_clean: fid": 8.5}
    assert found == {0: {"psnr_128": 20.5}, 6: {"psnr_128": 30.5}, 4: both, None: fid}
    assert run.config == {"a": 1}


@pytest.mark.parametrize("steps", ["6", {"a": 6}, None])
def test_damaged_figures_are_passed_over(tmp_path, steps):
    folder = made.run(tmp_path / "run", [{"step": 1, "loss": 10**400, "skipped": 0}])
    figures = {"1": {"psnr": 30.5, "ssim": 10**400}}
    results = {"steps": steps, "before": figures, "after": figures}
    (folder / "results.json").write_text(json.dumps(results))
    (run,) = made.data_of(report.page(find([str(folder)]), 10**6)[0])["runs"]
    assert run["figures"] == [[0, False, {"psnr_1": 30.5}], [None, False, {"psnr_1": 30.5}]]
    assert run["curves"]["loss"] == [[1, None]]


@pytest.mark.parametrize(
    "name, words",
    [
        ("missing", "there is no such folder"),
        ("file", "is no folder"),
        ("empty", "has no run: a run has metrics.jsonl"),
        ("batch", "python -m sana_jax.gallery"),
    ],
)
def test_a_folder_without_a_run_is_named(tmp_path, name, words):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "batch").mkdir()
    (tmp_path / "batch/manifest.jsonl").touch()
    with pytest.raises(UserError, match=words):
        find([str(tmp_path / name)])
