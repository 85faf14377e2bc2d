"""The command that says what a data set is: its answers, and what it refuses in one line."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import commands
from tests.data import formats
from tests.data.test_folder import PNG, make

ROOT = Path(__file__).parents[1]


def tar(path, *names):
    with tarfile.open(path, "w") as file:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(PNG)
            file.addfile(info, io.BytesIO(PNG))


def run(*flags):
    command = [sys.executable, "-m", "sana_jax.data_report", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_last_line_is_json_and_counts_add_up(tmp_path):
    tars = formats.tars(tmp_path / "tars", formats.pictures(20))
    result = run(f"webdataset:{tars}", f"--out={tmp_path / 'out'}", "--buckets=512")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "out/report.json").read_text())
    assert (found["read"], found["used"], found["files_without_a_picture"]) == (23, 20, 1)
    assert found["rejected"] == {"not_an_image": 1, "too_small": 1, "truncated": 1}
    assert "captions a picture" in result.stdout
    assert f"{found['height'][0]:.0f} (least), " in result.stdout
    assert "tar/half.jpg: truncated" in result.stderr


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the command says of each mistake, by the source that is given."""
    root = tmp_path_factory.mktemp("mistakes")
    for name in "cut", "twice", "index", "none":
        (root / name).mkdir()
    tar(root / "cut/x.tar", "a.png", "b.png")
    os.truncate(root / "cut/x.tar", 1500)
    tar(root / "twice/x.tar", "a.png", "a.png")
    index = {"wids_version": 1, "shardlist": [{"url": "gone.tar", "nsamples": 1}]}
    (root / "index/wids-meta.json").write_text(json.dumps(index))
    pq.write_table(pa.table({"url": ["u"]}), root / "none/x.parquet")
    make(root / "photos", {"a.png": PNG})
    found = commands.several(
        "sana_jax.data_report",
        [[source.format(root=root), f"--out={root / 'out'}"] for source, _ in MISTAKES],
        ROOT,
        os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return {source: answer for (source, _), answer in zip(MISTAKES, found, strict=True)}, root


MISTAKES = [
    ("webdataset:{root}/cut", "x.tar is cut short or damaged, in or after"),
    ("webdataset:{root}/twice", "x.tar: two members are called 'a.png'; give every sample"),
    ("webdataset:{root}/index", "wids-meta.json lists gone.tar, which is not there; make"),
    ("webdataset:{root}/none", "there is no *.tar in it"),
    ("webdataset:pipe:cat x.tar", "pipe:cat x.tar: data is read from files; copy it"),
    ("parquet:{root}/none", "x.parquet has no column with the bytes of pictures, only url"),
    ("parquet:{root}/cut/x.tar", "x.tar is cut short or damaged"),
    ("precomputed:{root}/photos", "these are latents already; give pictures"),
    ("{root}/missing", "there is no such folder; the data is shapes, tfds:NAME, webdataset:TARS"),
]


@pytest.mark.parametrize("source, words", MISTAKES)
def test_items_28_to_30_one_line_status_2_and_nothing_written(answers, source, words):
    found, root = answers
    status, out, err = found[source]
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not (root / "out").exists()


@pytest.mark.slow  # ten processes are killed
def test_kill_9_at_random_moments_and_the_same_files(tmp_path):
    tars = formats.tars(tmp_path / "tars", formats.pictures(3000))
    command = [sys.executable, "-m", "sana_jax.data_report", f"webdataset:{tars}"]
    for moment in np.random.default_rng(0).uniform(0.5, 6, 10):
        process = subprocess.Popen([*command, f"--out={tmp_path / 'out'}"], cwd=ROOT)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for name in "out", "whole":
        subprocess.run([*command, f"--out={tmp_path / name}"], cwd=ROOT, check=True)
    out, whole = (
        {str(path.relative_to(at)): path.read_bytes() for path in at.rglob("*") if path.is_file()}
        for at in (tmp_path / "out", tmp_path / "whole")
    )
    assert out == whole
