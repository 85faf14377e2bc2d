"""The rows of text that pictures are drawn with, and what is kept of them between calls."""

import numpy as np
import pytest

from sana_jax import SanaPipeline
from sana_jax.sharding import make_mesh
from tests import mini, toy


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    mini.save(folder := tmp_path_factory.mktemp("checkpoint"))
    mesh = make_mesh(devices=toy.devices(1))
    return SanaPipeline.from_pretrained(str(folder), dtype="float32", mesh=mesh)


def test_a_picture_has_its_prompt_after_its_negative_prompt(pipe):
    request = pipe.request(["a cat", "a dog"], num_images_per_prompt=2, negative_prompt="dark")
    captions, masks = pipe._read(request)
    assert captions.shape[:2] == masks.shape[:2] == (4, 2)
    rows, mask = pipe.encode_prompt(["a cat", "a dog"])
    for i in range(4):
        np.testing.assert_array_equal(captions[i, 1], rows[i // 2])
        np.testing.assert_array_equal(masks[i, 1], mask[i // 2])
        np.testing.assert_array_equal(captions[i, 0], captions[0, 0])
    assert len(pipe._negatives) == 1


def test_the_prompt_s_mask_may_cover_several_negative_prompts(pipe):
    prompts, negatives = ["a cat", "a very long story of two dogs"], ["dark", "a blurred photo"]
    mask = dict(unconditional_mask="prompt")
    captions, masks = pipe._read(pipe.request(prompts, negative_prompt=negatives, **mask))
    np.testing.assert_array_equal(masks[:, 0], masks[:, 1])
    for i, negative in enumerate(negatives):
        alone, _ = pipe._read(pipe.request(prompts[i], negative_prompt=negative, **mask))
        np.testing.assert_allclose(captions[i, 0], alone[0, 0], atol=1e-5)
        rows, visible = pipe.encode_prompt(negative, instruction=None)
        seen = np.asarray(visible[0])
        np.testing.assert_allclose(captions[i, 0][seen], rows[0][seen], atol=1e-5)
        assert np.abs(captions[i, 0][~seen]).min(axis=1).max() > 0  # padding has rows too


def test_without_guidance_there_is_the_prompt_alone(pipe):
    captions, masks = pipe._read(pipe.request("a cat", guidance_scale=1))
    assert captions.shape[:2] == masks.shape[:2] == (1, 1)
