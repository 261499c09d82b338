"""The picture that a video begins with: sizes, pixels, and what a video does with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from wan.models.kandinsky.geometry import rope_scale
from wan.models.kandinsky.picture import fit_picture, picture_pixels


@pytest.mark.parametrize(
    "picture, asked, size",
    (
        ((1000, 1000), (768, 512), (624, 624)),
        ((3000, 2000), (768, 512), (768, 512)),
        ((1920, 1080), (768, 512), (832, 464)),
        ((300, 200), (512, 768), (768, 512)),
        ((1000, 1000), (1280, 768), (1024, 1024)),
        ((1920, 1080), (1280, 768), (1408, 768)),
        ((1080, 1920), (1280, 768), (768, 1408)),
        ((10, 3000), (768, 512), (32, 10864)),
    ),
)
def test_a_videos_size_by_its_picture(picture, asked, size):
    assert fit_picture(picture, asked) == size


@pytest.mark.parametrize("asked", ((768, 512), (854, 480), (1280, 768)))
def test_what_fits_is_what_fits_again_and_of_one_resolution(asked):
    for width in range(300, 3000, 77):
        for height in range(300, 3000, 91):
            size = fit_picture((width, height), asked)
            assert fit_picture((width, height), size) == size
            assert rope_scale(size) == rope_scale(asked)


def test_pixels_are_resized_in_whole_levels_and_lie_in_the_vaes_range():
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    same = picture_pixels(picture, (60, 40))
    assert same.shape == (1, 3, 1, 40, 60) and same.dtype == torch.float32
    levels = ((same[0, :, 0] + 1) * 127.5).round().movedim(0, -1)
    assert torch.equal(levels, torch.from_numpy(picture).float())
    small = ((picture_pixels(picture, (32, 16))[0, :, 0] + 1) * 127.5).movedim(0, -1)
    torch.testing.assert_close(small, small.round(), atol=1e-4, rtol=0)
    # Pillow's bilinear filter is the same one, in fixed-point numbers.
    by_pillow = np.asarray(Image.fromarray(picture).resize((32, 16), Image.Resampling.BILINEAR))
    assert np.abs(small.numpy() - by_pillow).max() <= 1.01
