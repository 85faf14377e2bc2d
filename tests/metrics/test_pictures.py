"""What is measured of a folder: a batch run's pictures, or all."""

import json

import numpy as np
import pytest
from PIL import Image

from sana_jax.data.images import BadImage
from sana_jax.metrics.pictures import open_pictures
from sana_jax.runtime.errors import UserError


def save(path, shade):
    Image.fromarray(np.full((16, 16, 3), shade, np.uint8)).save(path)


def test_a_batch_run_is_its_manifest(tmp_path):
    lines = []
    for i, prompt in enumerate(["a cat", "a dog"]):
        name = f"00000{i}_7.png"
        save(tmp_path / name, 10 * i)
        lines.append({"file": name, "key": "k", "sha256": f"{i}", "prompt": prompt})
    lines.append({"file": "000002_7.png", "key": "k", "sha256": "gone"})
    save(tmp_path / "grid.png", 0)
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines[::-1]))
    source = open_pictures(str(tmp_path), "data")
    assert [source[i]["captions"] for i in range(2)] == [["a cat"], ["a dog"]]
    assert len(source) == 3 and source[1]["key"] == "000001_7.png"
    with pytest.raises(BadImage, match="000002_7.png: No such file") as error:
        source[2]
    assert (error.value.key, error.value.reason) == ("000002_7.png", "unreadable")

    before = source.fingerprint
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines[:2]))
    assert open_pictures(str(tmp_path), "data").fingerprint != before
    (tmp_path / "manifest.jsonl").write_text("")
    with pytest.raises(UserError, match="names no picture"):
        open_pictures(str(tmp_path), "data")


def test_any_other_folder_is_all_its_images(tmp_path):
    (tmp_path / "b").mkdir()
    save(tmp_path / "b/a.png", 1)
    save(tmp_path / "z.jpg", 2)
    (tmp_path / "z.txt").write_text("a bird\n")
    source = open_pictures(str(tmp_path), "data")
    assert [source[i]["key"] for i in range(len(source))] == ["b/a.png", "z.jpg"]
    assert [source[i]["captions"] for i in range(2)] == [[], ["a bird"]]
    for name, words in (("none", "no such folder"), ("z.txt", "no such folder"), ("", "empty")):
        path = str(tmp_path / name) if name else ""
        with pytest.raises(UserError, match=words):
            open_pictures(path, "data")
