"""VACE's context: what is kept of a source video, what of it is made anew, and pictures of what the video is to show.

As in the published program, to the float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nabla import InputError
from wan.config.geometry import Geometry
from wan.files.source_video import SourceVideo
from wan.models.wan.geometry import GEOMETRY
from wan.models.wan.picture import covering_size, pixels_of

WHITE = 1.0


def frames_taken(source: SourceVideo, most: int, geometry: Geometry = GEOMETRY) -> list[int]:
    """Numbers of the frames that are taken of a source, spread over all of it: 4n+1 of them, at most so many."""
    count = geometry.most_frames(min(source.count, most))
    # In the types of the published program, by which frames are taken that a time lies just between.
    begins, ends = ((np.arange(source.count) + n).astype(np.float64) / source.fps for n in (0, 1))
    begins, ends = begins.astype(np.float32), ends.astype(np.float32)
    times = np.linspace(0.0, np.stack((begins, ends), axis=1)[-1].mean(), count)[:, None]
    return np.argmax((times >= begins) & (times <= ends), axis=1).tolist()


def covering_frames(frames: Iterable[np.ndarray], size: tuple[int, int]) -> Tensor:
    """(3, frames, height, width) in [-1, 1] of frames (height, width, 3) uint8 that cover (width, height), their middle
    kept.
    """
    return torch.stack([_covering(frame, size) for frame in frames], dim=1)


def _covering(frame: np.ndarray, size: tuple[int, int]) -> Tensor:
    # Of whole levels, and smoothed where it becomes smaller. A copy, since what is read may not be written to.
    pixels = torch.from_numpy(frame.copy()).permute(2, 0, 1)
    (width, height), (own_height, own_width) = size, pixels.shape[1:]
    if (own_width, own_height) != size:
        across, down = covering_size((own_width, own_height), size)
        pixels = F.interpolate(pixels[None], size=(down, across), mode="bicubic", antialias=True)[0]
        top, left = (down - height) // 2, (across - width) // 2
        pixels = pixels[:, top : top + height, left : left + width]
    return pixels.float().div_(127.5).sub_(1.0)


def source_frames(
    source: SourceVideo | None, mask: SourceVideo | None, size: tuple[int, int], frame_num: int
) -> tuple[Tensor, Tensor]:
    """Pixels (3, F, height, width) in [-1, 1] of a source, and by how much each is made anew, (1, F, height, width).

    size: (width, height); frame_num: of which F is at most as many as the source has
    mask: 1 where white and 0 where black; without one all is made anew, and without a source of nothing
    """
    if source is None:
        shape = frame_num, size[1], size[0]
        return torch.zeros(3, *shape), torch.ones(1, *shape)
    numbers = frames_taken(source, frame_num)
    pixels = covering_frames(source.take(numbers), size)
    if mask is None:
        return pixels, torch.ones_like(pixels[:1])
    return pixels, covering_frames(mask.take(numbers), size)[:1].add_(1).div_(2).clamp_(0, 1)


def fitted_reference(picture: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Pixels (3, 1, height, width) of a picture (height, width, 3) uint8 as a whole, amid white where its form is
    another than that of (width, height).
    """
    pixels, (width, height) = pixels_of(picture), size
    own_height, own_width = pixels.shape[1:]
    if (own_width, own_height) == size:
        return pixels[:, None]
    scale = min(height / own_height, width / own_width)
    down, across = int(own_height * scale), int(own_width * scale)
    if not down or not across:
        raise InputError(
            f"a reference picture of {own_width}x{own_height} leaves nothing in {width}x{height}; "
            "cut it to what it shows"
        )
    # Not smoothed, however much smaller it becomes.
    small = F.interpolate(pixels[None], size=(down, across), mode="bilinear", align_corners=False)[0]
    canvas = torch.full((3, 1, height, width), WHITE)
    top, left = (height - down) // 2, (width - across) // 2
    canvas[:, 0, top : top + down, left : left + across] = small
    return canvas


def folded_mask(mask: Tensor, geometry: Geometry = GEOMETRY) -> Tensor:
    """(64, T, h, w) of a mask (1, F, height, width): the pixels of a latent as its channels, row by row."""
    frames, height, width = mask.shape[1:]
    _, rows, columns = geometry.vae_stride
    # (F, h, 8, w, 8) to (8 * 8, F, h, w).
    places = mask[0].reshape(frames, height // rows, rows, width // columns, columns).permute(2, 4, 0, 1, 3)
    folded = places.flatten(0, 1)
    latent = geometry.latents_size((width, height), frames)
    return F.interpolate(folded[None], size=latent, mode="nearest-exact")[0]


def context_of(
    encode: Callable[[Tensor], Tensor], pixels: Tensor, mask: Tensor, references: Sequence[Tensor] = ()
) -> Tensor:
    """The context (channels, references + T, h, w) that the transformer sees.

    encode: from pixels (3, F, height, width) in [-1, 1] to latents (C, T, h, w)
    pixels, mask: of `source_frames`; references: of `fitted_reference`, which stand before the video
    Channels are C of latents of what is kept, with grey in place of the rest, and C of what is made anew; then those of
    `folded_mask`. A reference is all kept.
    """
    new = (mask > 0.5).to(pixels)
    latents = torch.cat((encode(pixels * (1 - new)), encode(pixels * new)))
    folded = folded_mask(mask).to(latents)
    kept = [encode(reference) for reference in references]
    latents = torch.cat([*(torch.cat((one, torch.zeros_like(one))) for one in kept), latents], dim=1)
    none = folded.new_zeros(len(folded), len(references), *folded.shape[2:])
    return torch.cat((latents, torch.cat((none, folded), dim=1)))
