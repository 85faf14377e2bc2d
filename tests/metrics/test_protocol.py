"""How a batch run's pictures were drawn is told, and what a protocol would have done otherwise."""

import json

from sana_jax.metrics.protocol import PROTOCOLS, drawing

SANA = dict(PROTOCOLS["sana"].sampling, unconditional_mask="prompt", dtype="float32")


def folder(path, *changes):
    path.mkdir()
    own = {"key": "k", "sha256": "s", "prompt": "a cat"}
    lines = [
        {"file": f"{i:06}_{i}.png", "seed": i} | own | SANA | change
        for i, change in enumerate(changes)
    ]
    text = "".join(json.dumps(line) + "\n" for line in reversed(lines))
    (path / "manifest.jsonl").write_text(text)
    return str(path)


def test_the_settings_that_pictures_share_are_told(tmp_path):
    found = drawing(folder(tmp_path / "run", {}, {"width": 64}), PROTOCOLS["sana"])
    assert found["seeds"] == [0, 1]
    assert found["drawing"] == SANA | {"width": "varies"} and found["deviations"] == []
    other = drawing(folder(tmp_path / "other", {}, {"prompt": "a dog"}), None)
    assert "deviations" not in other and other["prompts_sha256"] != found["prompts_sha256"]


def test_deviations_are_named(tmp_path):
    changes = {"guidance_scale": 2.0, "seed": 7, "unconditional_mask": None}, {"loras": [["a", 1]]}
    path = folder(tmp_path / "run", *changes)
    assert drawing(path, PROTOCOLS["sana"])["deviations"] == [
        "guidance_scale 'varies', not 4.5",
        "unconditional_mask 'varies', not 'prompt'",
        "loras",
        "seeds do not count up from 0",
    ]
    assert "unconditional_mask" not in str(drawing(path, PROTOCOLS["clean"])["deviations"])


def test_only_pictures_that_are_measured_are_told_of(tmp_path):
    long = folder(tmp_path / "long", {}, {}, {"num_steps": 2, "prompt": "a dog"})
    short = folder(tmp_path / "short", {}, {})
    sana = PROTOCOLS["sana"]
    assert drawing(long, sana, 2) == drawing(short, sana) != drawing(long, sana)


def test_a_folder_of_other_origin_says_nothing(tmp_path):
    assert drawing(str(tmp_path), PROTOCOLS["sana"]) == {}
