"""The picture that a video begins with: what size it gives a video, and how it is brought to that."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nabla import InputError
from wan.config.settings import VideoSettings, changed
from wan.files.picture import picture_of
from wan.models.kandinsky.geometry import is_sd

# Of the published program: how many pixels a video has, and what its sides are multiples of.
SD_AREA, SD_MULTIPLE = 512 * 768, 16
HD_AREA, HD_MULTIPLE = 1024 * 1024, 128


def fit_picture(picture: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The (width, height) of a video of a picture's form, as large as the published one nearest to the size asked for.

    All are in pixels; of its own result, asked for again, it gives the same.
    """
    area, multiple = (SD_AREA, SD_MULTIPLE) if is_sd(size) else (HD_AREA, HD_MULTIPLE)
    scale = math.sqrt(area / (picture[0] * picture[1])) / multiple
    width, height = (max(round(side * scale), 1) * multiple for side in picture)
    return width, height


def check_takes_picture(transformer: nn.Module) -> None:
    """Raise `InputError` for a transformer that cannot be told which frames are given."""
    if not transformer.config.visual_cond:
        raise InputError("image is not taken: this transformer has no input for a given frame; leave it out")


def start_from(image: object, video: VideoSettings, transformer: nn.Module) -> tuple[np.ndarray | None, VideoSettings]:
    """The picture (height, width, 3) uint8 that a video begins with, and the video in its form; of None, no other.

    One whose size is exact keeps it.
    image: what `picture_of` reads; raises `InputError` for one that cannot be read or is not taken
    """
    if image is None:
        return None, video
    picture = picture_of(image)
    check_takes_picture(transformer)
    if video.exact_size:
        return picture, video
    return picture, changed(video, size=fit_picture((picture.shape[1], picture.shape[0]), video.size))


def picture_pixels(picture: np.ndarray, size: tuple[int, int]) -> Tensor:
    """(1, 3, 1, height, width) float32 in [-1, 1] of a picture (height, width, 3) uint8, brought to a size.

    size: (width, height); a picture of another form is stretched to it
    """
    pixels = torch.from_numpy(np.ascontiguousarray(picture)).movedim(2, 0)[None].float()
    if pixels.shape[:1:-1] != size:
        # Rounded to whole levels, as the published program's resizing does.
        pixels = F.interpolate(pixels, size[::-1], mode="bilinear", antialias=True).round().clamp(0, 255)
    return (pixels / 127.5 - 1)[:, :, None]
