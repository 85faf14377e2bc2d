"""The prompts of each benchmark, from files of the form that its authors publish."""

import json

import pytest

from sana_jax.batch.tasks import make_tasks, read_rows
from sana_jax.judges.benchmarks import read_prompts
from sana_jax.runtime.errors import UserError


def test_prompts_are_those_of_the_source_and_sample_reads_them(tmp_path):
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg/256.txt").write_text("two cats\n")
    (tmp_path / "dpg/1.txt").write_text("a dog")
    (tmp_path / "ir.json").write_text(json.dumps([{"id": "004-0100", "prompt": "a fox", "x": 1}]))
    (tmp_path / "hps").mkdir()
    (tmp_path / "hps/photo.json").write_text('["a hat", "a cap"]')
    (tmp_path / "hps/anime.json").write_text('["a hat"]')
    (tmp_path / "meta_data.json").write_text('{"f1": {"category": "art", "prompt": "a sea"}}')
    expected = {
        "dpg": ("dpg", [("a dog", {"item_id": "1"}), ("two cats", {"item_id": "256"})]),
        "imagereward": ("ir.json", [("a fox", {"id": "004-0100"})]),
        "hps": (
            "hps",
            [
                (t, {"style": s})
                for t, s in [("a hat", "anime"), ("a hat", "photo"), ("a cap", "photo")]
            ],
        ),
        "mjhq": ("meta_data.json", [("a sea", {"id": "f1", "category": "art"})]),
    }
    for benchmark, (source, prompts) in expected.items():
        file = tmp_path / f"{benchmark}.jsonl"
        file.write_text(read_prompts(benchmark, str(tmp_path / source)))
        tasks = make_tasks(read_rows(str(file)), {"guidance_scale": 4.5}, 0, 1)
        assert [(task.prompt, task.extras) for task in tasks] == prompts


@pytest.mark.parametrize(
    "benchmark, content",
    [
        ("imagereward", "<html>"),
        ("imagereward", '{"id": 1}'),
        ("imagereward", '[{"id": 1}]'),
        ("imagereward", "[]"),
        ("mjhq", "[1]"),
        ("mjhq", '{"a": {"prompt": 5, "category": "x"}}'),
        ("dpg", "a text"),
        ("hps", "[]"),
    ],
)
def test_other_sources_are_refused(tmp_path, benchmark, content):
    (tmp_path / "source").write_text(content)
    for source in "source", "none":
        with pytest.raises(UserError, match="source"):
            read_prompts(benchmark, str(tmp_path / source))


@pytest.mark.parametrize("content", ['{"a hat": 1}', '"a hat"', "[1]", "5"])
def test_styles_that_are_no_lists_of_texts_are_refused(tmp_path, content):
    (tmp_path / "anime.json").write_text(content)
    with pytest.raises(UserError, match="is not what hps calls its prompts"):
        read_prompts("hps", str(tmp_path))
