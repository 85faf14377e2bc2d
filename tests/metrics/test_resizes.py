"""Resized pictures to the last bit: torch's, Pillow's and clean-fid's."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sana_jax.checkpoints.clip import MEAN, STD
from sana_jax.metrics import resizes
from tests import references

SIZES = [(512, 512), (200, 300), (299, 299), (640, 481), (64, 40), (17, 16), (1, 3)]


def noise(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.fixture
def two_threads():
    """Torch 2.13 interpolates by other arithmetic, with other last bits, where it has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", SIZES)
def test_bilinear_is_torchs(two_threads, size):
    pixels = noise(*size)
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None].float().div(255).contiguous()
    resized = torch.nn.functional.interpolate(
        planes, size=(299, 299), mode="bilinear", align_corners=False
    )
    expected = (2 * resized - 1)[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(resizes.bilinear(pixels), expected)


@pytest.mark.filterwarnings("ignore:.*mode.*:DeprecationWarning")
@pytest.mark.parametrize("size", SIZES)
def test_bicubic_is_clean_fids(size):
    theirs = references.clean_resize.build_resizer("clean")
    expected = (torch.from_numpy(theirs(noise(*size))) - 128) / 128  # as its network begins
    np.testing.assert_array_equal(resizes.bicubic(noise(*size)), expected.numpy())


@pytest.mark.parametrize("size, crop", [((40, 60), (0, 8)), ((61, 40), (8, 0)), ((32, 32), (0, 0))])
def test_a_square_is_covered_and_cropped(size, crop):
    """As torchvision: 40 x 60 becomes 32 x 48; 61 x 40 becomes 48.8, cut to 48, x 32."""
    pixels, scale = noise(*size), 32 / min(size)
    height, width = (int(side * scale) for side in size)
    resized = np.asarray(Image.fromarray(pixels).resize((width, height), resizes.BILINEAR))
    top, left = crop
    found = resizes.cover_and_crop(pixels, 32, resizes.BILINEAR)
    np.testing.assert_array_equal(found, resized[top : top + 32, left : left + 32])
    prepared = resizes.inception_input("bicubic", 32)(pixels)
    np.testing.assert_array_equal(prepared, resizes.bicubic(found))


@pytest.mark.parametrize("size", SIZES[:5])
def test_clip_is_transformers(size):
    """Where three rows are cut off in all, OpenAI cuts two of them above, and transformers one."""
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56)
    expected = theirs(Image.fromarray(noise(*size)), return_tensors="np")["pixel_values"][0]
    found = resizes.clip_input("clip", 56, MEAN, STD)(noise(*size))
    np.testing.assert_allclose(found, expected.transpose(1, 2, 0), atol=1e-6)


def test_jpeg_is_that_of_torchvisions_files(tmp_path):
    """save_image passes a file to Pillow without a quality."""
    pixels = np.asarray(Image.fromarray(noise(5, 5)).resize((40, 32)))
    Image.fromarray(pixels).save(tmp_path / "picture.jpg")
    stored = np.asarray(Image.open(tmp_path / "picture.jpg"))
    np.testing.assert_array_equal(resizes.as_jpeg(pixels), stored)
    assert (stored != pixels).any()


def test_cmmd_crops_before_it_resizes():
    pixels = noise(61, 40)
    square = Image.fromarray(pixels[10:50]).resize((28, 28), resizes.BICUBIC)
    expected = (np.asarray(square) / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    np.testing.assert_array_equal(resizes.clip_input("cmmd", 28, MEAN, STD)(pixels), expected)
