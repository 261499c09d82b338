"""VACE's context: sizes, frames, pixels and masks, each against a plain way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from vace_pipelines import drawn

from nabla import InputError
from wan.files.source_video import SourceVideo
from wan.models.wan.sizes import fit_source
from wan.models.wan.vace_condition import (
    context_of,
    covering_frames,
    fitted_reference,
    folded_mask,
    frames_taken,
    source_frames,
)


@pytest.mark.parametrize(
    "source, asked, size",
    (
        ((1920, 1080), (832, 480), (832, 480)),
        ((1280, 720), (1280, 720), (1280, 720)),
        ((832, 480), (480, 832), (832, 480)),
        # Never enlarged.
        ((143, 277), (832, 480), (128, 256)),
        ((16, 16), (832, 480), (16, 16)),
        ((1000, 1000), (832, 480), (640, 624)),
    ),
)
def test_a_video_has_its_sources_form(source, asked, size):
    assert fit_source(source, asked) == size


@pytest.mark.parametrize("source", ((15, 400), (400, 15), (16, 16000), (1, 1)))
def test_a_source_of_which_nothing_is_left_is_refused(source):
    try:
        width, height = fit_source(source, (64, 64))
    except InputError as error:
        assert f"{source[0]}x{source[1]} leaves nothing" in str(error)
    else:
        assert min(width, height) > 0


def source_of(count: int, fps: float = 10.0) -> SourceVideo:
    return SourceVideo(np.zeros((count, 2, 2, 3), np.uint8), fps)


@pytest.mark.parametrize("fps", (7.3, 10.0, 16.0, 30000 / 1001))
def test_frames_are_spread_over_all_of_the_source(fps):
    for count in range(1, 140):
        numbers = frames_taken(source_of(count, fps), 81)
        assert len(numbers) == min(81, (count - 1) // 4 * 4 + 1) and numbers[0] == 0
        # A time of one frame in a thousand is on the border of two.
        exact = [n * (count - 0.5) / max(len(numbers) - 1, 1) for n in range(len(numbers))]
        assert all(math.floor(time - 1e-4) <= number <= time + 1e-4 for number, time in zip(numbers, exact))
        assert numbers == sorted(set(numbers))


def test_frames_of_the_size_asked_for_are_not_touched_and_others_cover_it():
    frames = drawn(3, 32, 48, 3)
    exact = torch.from_numpy(frames).movedim(3, 0) / 127.5 - 1
    assert torch.equal(covering_frames(frames, (48, 32)), exact)
    # Wider than asked for: the middle columns of the picture at half its size.
    wide = covering_frames(drawn(1, 64, 128, 3), (32, 32))
    assert wide.shape == (3, 1, 32, 32)
    flat = covering_frames(np.full((1, 30, 70, 3), 51, np.uint8), (48, 64))
    assert torch.allclose(flat, torch.tensor(-0.6)) and flat.shape == (3, 1, 64, 48)
    edges = np.zeros((1, 32, 96, 3), np.uint8)
    edges[:, :, 32:64] = 255
    assert covering_frames(edges, (32, 32)).min() == 1


def test_a_mask_is_grey_between_and_that_of_the_frames_taken():
    frames = drawn(6, 32, 32, 3)
    mask = np.broadcast_to(np.arange(6, dtype=np.uint8)[:, None, None, None] * 51, (6, 32, 32, 3))
    pixels, made = source_frames(SourceVideo(frames), SourceVideo(mask), (32, 32), 81)
    assert pixels.shape == (3, 5, 32, 32) and made.shape == (1, 5, 32, 32)
    assert torch.allclose(made[0, :, 0, 0], torch.tensor([0, 0.2, 0.4, 0.8, 1.0]))


def test_references_are_whole_and_amid_white():
    picture = drawn(20, 40, 3)
    assert torch.equal(fitted_reference(picture, (40, 20))[:, 0], torch.from_numpy(picture).movedim(2, 0) / 255 * 2 - 1)
    fitted = fitted_reference(np.zeros((20, 40, 3), np.uint8), (32, 48))[:, 0]
    assert fitted.shape == (3, 48, 32) and (fitted[:, 16:32] == -1).all()
    assert (fitted[:, :16] == 1).all() and (fitted[:, 32:] == 1).all()
    with pytest.raises(InputError, match="a reference picture of 4000x1 leaves nothing in 32x48"):
        fitted_reference(np.zeros((1, 4000, 3), np.uint8), (32, 48))


def test_a_folded_mask_has_each_pixel_in_a_channel():
    mask = torch.rand(1, 9, 32, 48)
    folded = folded_mask(mask)
    assert folded.shape == (64, 3, 4, 6)
    frames = torch.nn.functional.interpolate(torch.arange(9.0)[None, None], size=3, mode="nearest-exact").flatten()
    for frame, taken in enumerate(frames.int().tolist()):
        for row in (0, 3, 7):
            for column in (0, 2, 7):
                assert torch.equal(folded[row * 8 + column, frame], mask[0, taken, row::8, column::8])


def test_what_is_kept_and_made_parts_at_a_half_and_references_are_kept():
    def encode(pixels):
        return pixels[:, ::4, ::8, ::8] + 0.0

    pixels, mask = torch.rand(3, 5, 16, 16), torch.rand(1, 5, 16, 16)
    first, second = torch.rand(3, 1, 16, 16), torch.rand(3, 1, 16, 16)
    context = context_of(encode, pixels, mask, [first, second])
    assert context.shape == (3 + 3 + 64, 4, 2, 2)
    made = (mask > 0.5).float()
    assert torch.equal(context[:3, 2:], encode(pixels * (1 - made)))
    assert torch.equal(context[3:6, 2:], encode(pixels * made))
    assert torch.equal(context[:3, :2], torch.cat((encode(first), encode(second)), dim=1))
    assert not context[3:, :2].any() and torch.equal(context[6:, 2:], folded_mask(mask))
