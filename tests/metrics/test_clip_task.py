"""evaluate --task=clip_score and --task=cmmd against transformers on the same pictures."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sana_jax.checkpoints.clip import MEAN, STD
from sana_jax.metrics import clip_task, resizes
from sana_jax.metrics.clip_task import Options, clip_score, image_distance
from sana_jax.runtime.errors import UserError
from tests import toy_clip

PROMPTS = ["a cat", "two red circles above a line", "be ba bo " * 20, "e"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A toy CLIP, a folder of a batch run of four pictures, and one of six others."""
    path = tmp_path_factory.mktemp("clip")
    (path / "clip").mkdir()
    model = toy_clip.save(path / "clip")
    rng = np.random.default_rng(0)
    for name, count in (("run", 4), ("real", 6)):
        (path / name).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 256, (5, 4, 3)).astype(np.uint8)
            size = ((40, 40), (32, 32), (56, 40))[i % 3]
            Image.fromarray(pixels).resize(size).save(path / name / f"{i}.png")
    lines = [
        {"file": f"{i}.png", "key": "k", "sha256": "s", "prompt": prompt}
        for i, prompt in enumerate(PROMPTS)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "run" / "manifest.jsonl").write_text(text)
    return path, model


@pytest.fixture
def options(shared):
    path = shared[0]
    return Options(data=str(path / "run"), weights=str(path / "clip"), batch_size=8)


def features(model, images):
    with torch.no_grad():
        found = model.get_image_features(torch.from_numpy(np.stack(images)))
    found = getattr(found, "pooler_output", found)
    return (found / found.norm(dim=-1, keepdim=True)).double().numpy()


def test_score_is_transformers(shared, options):
    path, model = shared
    images = [Image.open(path / "run" / f"{i}.png") for i in range(4)]
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    pixels = processor(images, return_tensors="np")["pixel_values"]
    tokenizer = CLIPTokenizerFast.from_pretrained(path / "clip")
    tokens = tokenizer(PROMPTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        text = model.get_text_features(**tokens)
    text = getattr(text, "pooler_output", text)
    text = (text / text.norm(dim=-1, keepdim=True)).double().numpy()
    scores = 100 * (features(model, list(pixels)) * text).sum(axis=-1)
    found = clip_score(options)
    assert np.std(scores) > 1
    assert found["clip_score"] == pytest.approx(scores.mean(), abs=1e-4)
    assert found["standard_error"] == pytest.approx(scores.std(ddof=1) / 2, rel=1e-4)
    assert (found["count"], found["rejected"], found["preprocess"]) == (4, {}, "clip")


def test_pictures_without_a_prompt_are_named(shared, options, tmp_path):
    path = shared[0]
    for i in range(3):
        (tmp_path / f"{i}.png").symlink_to(path / "real" / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"{PROMPTS[i]}\n" if i != 1 else "")
    found = clip_score(dataclasses.replace(options, data=str(tmp_path)))
    assert found["count"] == 2 and found["rejected"] == {"bad_caption": 1}
    assert list(found["rejected_pictures"]) == ["1.png"]


def test_cmmd_is_that_of_transformers_features(shared, options):
    path, model = shared
    sets = []
    for name, count in (("run", 4), ("real", 6)):
        images = [np.asarray(Image.open(path / name / f"{i}.png")) for i in range(count)]
        prepare = resizes.clip_input("cmmd", 32, MEAN, STD)
        sets.append(features(model, [prepare(x).transpose(2, 0, 1) for x in images]))

    def mean(x, y):
        return np.exp(-((x[:, None] - y) ** 2).sum(-1) / 200).mean()

    expected = 1000 * (mean(*[sets[0]] * 2) + mean(*[sets[1]] * 2) - 2 * mean(*sets))
    found = image_distance(dataclasses.replace(options, reference=str(path / "real")))
    assert found["cmmd"] == pytest.approx(expected, rel=1e-4)
    assert (found["count"], found["reference_count"], found["sigma"]) == (4, 6, 10)
    assert f"{found['cmmd']:.4f}" in clip_task.table(found)


def test_a_weights_folder_that_is_none_is_refused(options, tmp_path):
    with pytest.raises(UserError, match="is no folder: give one with CLIP"):
        clip_score(dataclasses.replace(options, weights=str(tmp_path / "none")))
