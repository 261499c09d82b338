"""The pictures that a video begins or ends with, as the VAE sees them, and what says which frames they are."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nabla import InputError
from wan.config.inputs import check_both_ends
from wan.config.settings import VideoSettings
from wan.files.picture import MAX_PIXELS
from wan.models.wan.geometry import GEOMETRY


def pixels_of(picture: np.ndarray) -> Tensor:
    """(3, height, width) float32 in [-1, 1] of a picture (height, width, 3) uint8."""
    return torch.from_numpy(np.ascontiguousarray(picture)).movedim(2, 0).float().div(255).sub(0.5).div(0.5)


def stretched(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels (3, height, width) brought to (width, height), of whatever form they were.

    As in the published program: not smoothed before they are made smaller, and not held within [-1, 1].
    """
    return F.interpolate(pixels[None], size[::-1], mode="bicubic", antialias=False)[0]


def covering_size(own: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) to which a picture of `own` is brought, all of it, so that it covers `size`.

    Raises `InputError` for one so narrow that it would not fit in memory, of which next to nothing would be kept.
    """
    scale = max(size[0] / own[0], size[1] / own[1])
    whole = round(own[0] * scale), round(own[1] * scale)
    if whole[0] * whole[1] > MAX_PIXELS:
        given, asked, made = ("x".join(map(str, one)) for one in (own, size, whole))
        raise InputError(
            f"a picture of {given} covers {asked} only if it is made {made}; cut out the part of it that is meant"
        )
    return whole


def covering(picture: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Pixels (3, height, width) of a picture (height, width, 3) uint8 that covers (width, height), its middle kept.

    By Lanczos' filter in whole levels, as Wan2.2's TI2V-5B was published with. Raises as `covering_size` does.
    """
    height, width, _ = picture.shape
    whole = covering_size((width, height), size)
    image = Image.fromarray(picture).resize(whole, Image.Resampling.LANCZOS)
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    return pixels_of(np.array(image.crop((left, top, left + size[0], top + size[1]))))


def given_frames(video: VideoSettings, image: np.ndarray, last_image: np.ndarray | None = None) -> Tensor:
    """(1, 3, frames, height, width) of a video whose first frame, and last one, is given; the others are zeros, grey.

    image, last_image: (height, width, 3) uint8, each stretched to the video's size
    Raises `InputError` for a video too short for both.
    """
    if last_image is not None:
        check_both_ends(video.frame_num)
    frames = torch.zeros(1, 3, video.frame_num, *video.size[::-1])
    frames[0, :, 0] = stretched(pixels_of(image), video.size)
    if last_image is not None:
        frames[0, :, -1] = stretched(pixels_of(last_image), video.size)
    return frames


def given_mask(video: VideoSettings, last: bool) -> Tensor:
    """(1, channels, T, h, w) float32, as many channels as frames in a latent one: 1 where the frame is given, else 0.

    last: whether the last frame is given too. The first frame has a latent one of its own, all of which it is.
    """
    stride = GEOMETRY.vae_stride[0]
    is_given = torch.zeros(video.frame_num)
    is_given[0] = 1
    if last:
        is_given[-1] = 1
    channels = torch.cat((is_given[:1].expand(stride), is_given[1:])).view(-1, stride).T
    return channels[None, :, :, None, None].expand(1, *channels.shape, *video.latents_size[1:])
