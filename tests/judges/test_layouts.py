"""The folders that judges are given: names, contents, and what goes on after a kill."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from sana_jax.judges import layouts
from sana_jax.judges.layouts import export
from sana_jax.runtime.errors import UserError
from tests.judges import runs

TWO = [
    {"prompt": "a cat", "tag": "single_object", "include": [{"class": "cat", "count": 1}]},
    {"prompt": "no dog", "tag": "x", "include": [], "exclude": [{"class": "dog", "count": 1}]},
]


def names(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in names(folder)}


def test_geneval(tmp_path):
    """As the generate script of its authors writes it."""
    run = runs.write(tmp_path / "run", TWO, each=2)
    assert export("geneval", str(run), str(tmp_path / "out"), each=2) == 2
    folder = tmp_path / "out/pictures"
    assert names(folder) == [
        f"{p}/{name}"
        for p in ("00000", "00001")
        for name in ("metadata.jsonl", "samples/00000.png", "samples/00001.png")
    ]
    for p, prompt in enumerate(TWO):
        assert json.loads((folder / f"{p:05}/metadata.jsonl").read_text()) == prompt
    third = (folder / "00001/samples/00000.png").read_bytes()
    assert third == (run / "000002_2.png").read_bytes()


def test_dpg_has_four_pictures_in_one(tmp_path):
    run = runs.write(tmp_path / "run", [{"prompt": "a", "item_id": "COCOval2014000000217622"}], 4)
    export("dpg", str(run), str(tmp_path / "out"))
    (grid,) = (tmp_path / "out/pictures").iterdir()
    assert grid.name == "COCOval2014000000217622.png"
    grid = np.asarray(Image.open(grid))
    assert grid.shape == (16, 16, 3)
    for j, (top, left) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):  # the judge's own order
        picture = np.asarray(Image.open(run / f"{j:06}_{j}.png"))
        np.testing.assert_array_equal(grid[top : top + 8, left : left + 8], picture)


def test_imagereward_and_hps(tmp_path):
    run = runs.write(tmp_path / "run", [{"prompt": "a", "id": 7}, {"prompt": "b", "id": "8"}], 10)
    export("imagereward", str(run), str(tmp_path / "ir"))
    expected = sorted(f"{name}_{j}.png" for name in "78" for j in range(10))
    assert names(tmp_path / "ir/pictures/run") == expected  # and nothing else: it counts them
    listed = json.loads((tmp_path / "ir/prompts.json").read_text())
    assert listed == [{"id": 7, "prompt": "a"}, {"id": "8", "prompt": "b"}]

    styles = ["anime", "photo", "photo"]
    run = runs.write(tmp_path / "hps", [{"prompt": s, "style": s} for s in styles], 1)
    export("hps", str(run), str(tmp_path / "out"))
    folder = tmp_path / "out/pictures/hps"
    assert names(folder) == ["anime/00000.jpg", "photo/00000.jpg", "photo/00001.jpg"]
    assert json.loads((tmp_path / "out/photo.json").read_text()) == ["photo", "photo"]
    expected = io.BytesIO()
    Image.open(run / "000002_2.png").save(expected, "JPEG")
    assert (folder / "photo/00001.jpg").read_bytes() == expected.getvalue()


@pytest.mark.parametrize("data", [".", "../hps", "inner/.."])
def test_a_run_that_is_named_by_dots_has_its_own_name(tmp_path, monkeypatch, data):
    run = runs.write(tmp_path / "hps", [{"prompt": "a", "style": "photo"}], 1)
    (run / "inner").mkdir()
    monkeypatch.chdir(run)
    export("hps", data, str(tmp_path / "out"))
    assert names(tmp_path / "out/pictures") == ["hps/photo/00000.jpg"]


@pytest.mark.parametrize("most", range(3))
def test_a_killed_export_goes_on(tmp_path, monkeypatch, most):
    run = runs.write(tmp_path / "run", [{"prompt": f"{i}", "item_id": i} for i in range(3)], 4)
    export("dpg", str(run), str(tmp_path / "whole"))
    made = []

    def content(*arguments):
        if len(made) == most:
            raise KeyboardInterrupt
        made.append(arguments)
        return whole(*arguments)

    whole = layouts._content
    monkeypatch.setattr(layouts, "_content", content)
    with pytest.raises(KeyboardInterrupt):
        export("dpg", str(run), str(tmp_path / "out"))
    most = None
    export("dpg", str(run), str(tmp_path / "out"))
    assert len(made) == 3 and contents(tmp_path / "out") == contents(tmp_path / "whole")
    export("dpg", str(run), str(tmp_path / "out"))
    assert len(made) == 3
    (tmp_path / "out/pictures/1.png").unlink()
    export("dpg", str(run), str(tmp_path / "out"))
    assert len(made) == 4 and contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path):
    run = str(runs.write(tmp_path / "run", TWO, each=4))
    items = [{"prompt": "a", "item_id": item} for item in ("1", "1")]
    twice = str(runs.write(tmp_path / "twice", items, each=4))
    bad = str(runs.write(tmp_path / "bad", [{"prompt": "a", "item_id": "../x"}], each=4))
    lost = runs.write(tmp_path / "lost", TWO, each=4)
    lines = (lost / "manifest.jsonl").read_text().splitlines()
    (lost / "manifest.jsonl").write_text("\n".join(lines[:3] + lines[4:]))
    (tmp_path / "plain").mkdir()
    odd = str(runs.write(tmp_path / "odd", [{"prompt": {"a": 1}, "item_id": "1"}], each=4))
    cases = [
        (("geneval", run, 3), "there are not 3 pictures of one prompt"),
        (("geneval", run, 8), "there are not 8 pictures of one prompt"),
        (("dpg", run, None), "has no item_id, which dpg needs"),
        (("dpg", odd, None), "there are not 4 pictures of one prompt"),
        (("dpg", twice, None), "two of its prompts have the same item_id"),
        (("dpg", bad, None), "item_id='../x' names no file"),
        (("geneval", str(lost), None), "picture 000004 is missing; run `sample` again"),
        (("geneval", str(tmp_path / "plain"), None), "has no manifest.jsonl"),
        (("geneval", str(tmp_path / "none"), None), "has no manifest.jsonl"),
    ]
    for (benchmark, data, each), words in cases:
        with pytest.raises(UserError) as error:
            export(benchmark, data, str(tmp_path / "out"), each)
        assert words in str(error.value)
    assert not (tmp_path / "out").exists()


def test_folders_of_others_and_changed_pictures_are_refused(tmp_path):
    run = runs.write(tmp_path / "run", TWO, each=4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        export("geneval", str(run), str(tmp_path / "mine"))
    assert names(tmp_path / "mine") == ["letter.txt"]
    (tmp_path / "mine/manifest.jsonl").write_text('{"audio": "a.wav"}')
    with pytest.raises(UserError, match="manifest.jsonl is not of this program"):
        export("geneval", str(run), str(tmp_path / "mine"))
    assert (tmp_path / "mine/manifest.jsonl").read_text() == '{"audio": "a.wav"}'
    before = contents(run)
    with pytest.raises(UserError, match="of other pictures"):
        export("geneval", str(run), str(run))
    assert contents(run) == before
    export("geneval", str(run), str(tmp_path / "out"))
    other = runs.write(tmp_path / "other", TWO, each=4, side=9)
    with pytest.raises(UserError, match="of other pictures"):
        export("geneval", str(other), str(tmp_path / "out"))
    named = (run / "manifest.jsonl").read_text()
    (run / "manifest.jsonl").write_text(named.replace("000001_1.png", "000001_\\u0000"))
    with pytest.raises(UserError, match="embedded null"):
        export("geneval", str(run), str(tmp_path / "again"))
    (run / "manifest.jsonl").write_text(named)
    (run / "000001_1.png").write_bytes(b"x")
    with pytest.raises(UserError, match="is not the picture that was drawn"):
        export("geneval", str(run), str(tmp_path / "again"))
    (run / "000001_1.png").unlink()
    with pytest.raises(UserError, match="000001_1.png: .*; run `sample` again"):
        export("geneval", str(run), str(tmp_path / "again"))
