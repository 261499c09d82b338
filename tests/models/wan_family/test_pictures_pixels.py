"""The pictures that Wan's videos begin with: sizes by their form, pixels, and what says which frames are given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from nabla import InputError
from wan.config.settings import VideoSettings
from wan.models.family import Layout
from wan.models.wan.family import WAN
from wan.models.wan.picture import covering, given_frames, given_mask, pixels_of, stretched
from wan.models.wan.sizes import area_size, best_output_size
from wan.models.wan.vace_condition import covering_frames

AREA_480P, AREA_720P, AREA_5B = 480 * 832, 720 * 1280, 704 * 1280


@pytest.mark.parametrize(
    "picture, area, size",
    (
        # A root of 479.99... falls by a whole multiple, as published.
        ((832, 480), AREA_480P, (832, 464)),
        ((480, 832), AREA_480P, (480, 832)),
        ((1280, 720), AREA_480P, (832, 464)),
        ((1280, 720), AREA_720P, (1280, 720)),
        ((1000, 1000), AREA_480P, (624, 624)),
        ((152, 298), 35439, (128, 256)),
    ),
)
def test_a_size_of_about_an_area(picture, area, size):
    assert area_size(picture, area) == size


@pytest.mark.parametrize(
    "picture, area, size",
    (
        ((1280, 704), AREA_5B, (1280, 704)),
        ((1920, 1080), AREA_5B, (1248, 704)),
        ((1080, 1920), AREA_5B, (704, 1248)),
        ((610, 300), 132072, (512, 256)),
        # Both ways are as near: that of the height is taken.
        ((1000, 1000), AREA_5B, (960, 928)),
    ),
)
def test_a_size_within_an_area(picture, area, size):
    assert best_output_size(picture, area, (32, 32)) == size


@pytest.mark.parametrize(
    "kind, size",
    (
        ("t2v", (832, 480)),
        ("i2v", (832, 464)),
        ("flf2v", (832, 464)),
        ("i2v-A14B", (832, 464)),
        ("ti2v-5B", (832, 480)),
    ),
)
def test_each_kind_has_its_rule(kind, size):
    assert WAN.fit_size(Layout(True, {}, kind), (1280, 720), (832, 480)) == size


@pytest.mark.parametrize("picture", ((10, 30000), (30000, 10)))
def test_a_form_that_leaves_nothing_is_refused(picture):
    for size in (lambda: area_size(picture, AREA_480P), lambda: best_output_size(picture, AREA_480P, (32, 32))):
        with pytest.raises(InputError, match=rf"picture of {picture[0]}x{picture[1]} leaves nothing of its .*larger"):
            size()


def picture_of(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def cubic(x: float) -> float:
    """The weight of a pixel at a distance, of the cubic filter with a = -0.75."""
    x, a = abs(x), -0.75
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def test_stretching_is_four_pixels_wide_however_small_it_makes_a_picture_and_overshoots():
    pixels = pixels_of(picture_of(40, 12))
    small = stretched(pixels, (10, 12))
    assert small.shape == (3, 12, 10)
    for place in (0, 4, 9):
        centre = (place + 0.5) * 4 - 0.5
        wanted = sum(pixels[:, :, min(max(n, 0), 39)] * cubic(n - centre) for n in range(-3, 43))
        torch.testing.assert_close(small[:, :, place], wanted, atol=1e-5, rtol=0)
    edge = torch.ones(3, 8, 8)
    edge[:, :, :4] = -1
    assert stretched(edge, (20, 8)).abs().max() > 1.01


def test_covering_keeps_the_middle_and_the_form():
    picture = picture_of(60, 40)
    assert torch.equal(covering(picture, (60, 40)), pixels_of(picture))
    wide = covering(picture, (32, 32))
    by_pillow = Image.fromarray(picture).resize((48, 32), Image.Resampling.LANCZOS).crop((8, 0, 40, 32))
    assert torch.equal(wide, pixels_of(np.array(by_pillow)))
    assert covering(picture, (96, 32)).shape == (3, 32, 96)


def test_what_covers_a_video_only_by_more_than_memory_holds_is_refused():
    thin = np.zeros((30_000, 4, 3), np.uint8)
    for cover in (covering, lambda picture, size: covering_frames([picture], size)):
        assert cover(thin, (64, 64)).shape[-2:] == (64, 64)
        with pytest.raises(InputError, match="^a picture of 4x30000 covers 1280x704 only if it is made 1280x9600000; "):
            cover(thin, (1280, 704))


def test_frames_and_the_channels_that_say_which_are_given():
    video = VideoSettings((32, 48), 9)
    image, last = picture_of(50, 70), picture_of(33, 21, seed=1)
    first_only, both = given_frames(video, image), given_frames(video, image, last)
    assert first_only.shape == both.shape == (1, 3, 9, 48, 32)
    assert torch.equal(first_only[:, :, 0], both[:, :, 0]) and not first_only[:, :, 1:].any()
    # A last picture of another form is stretched to the same size, not cropped.
    assert torch.equal(both[0, :, -1], stretched(pixels_of(last), (32, 48))) and not both[:, :, 1:-1].any()
    wanted = torch.zeros(1, 4, 3, 6, 4)
    wanted[:, :, 0] = 1
    assert torch.equal(given_mask(video, last=False), wanted)
    wanted[:, 3, 2] = 1
    assert torch.equal(given_mask(video, last=True), wanted)


def test_one_frame_is_too_short_for_two_pictures():
    video = VideoSettings((32, 48), 1)
    assert given_frames(video, picture_of(32, 48)).shape == (1, 3, 1, 48, 32)
    assert torch.equal(given_mask(video, last=False), torch.ones(1, 4, 1, 6, 4))
    with pytest.raises(InputError, match="^frame_num 1 is too short for a first and a last picture; use 5 or more$"):
        given_frames(video, picture_of(32, 48), picture_of(32, 48))
