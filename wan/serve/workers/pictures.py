"""What shows a video before it is played: a picture of how it begins, and one of moments from all of it."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

# The longer side of a thumbnail, and of each moment on a sheet, in pixels; moments on a sheet, and in a row of it.
THUMBNAIL, MOMENT = 512, 256
MOMENTS, IN_A_ROW = 16, 4


def jpeg(frame: np.ndarray) -> bytes:
    """A frame (height, width, 3) uint8 as a JPEG."""
    return _encoded(Image.fromarray(frame), "JPEG")


def thumbnail(frames: np.ndarray) -> bytes:
    """The first of frames (frames, height, width, 3) uint8 as a small WebP."""
    return _encoded(_small(frames[0], THUMBNAIL), "WEBP")


def sprite_sheet(frames: np.ndarray) -> bytes:
    """Moments of (frames, height, width, 3) uint8, the first and the last among them, in rows on a WebP."""
    count = min(len(frames), MOMENTS)
    moments = [_small(frames[number], MOMENT) for number in np.linspace(0, len(frames) - 1, count).round().astype(int)]
    width, height = moments[0].size
    columns = min(count, IN_A_ROW)
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height))
    for number, moment in enumerate(moments):
        row, column = divmod(number, columns)
        sheet.paste(moment, (column * width, row * height))
    return _encoded(sheet, "WEBP")


def _small(frame: np.ndarray, side: int) -> Image.Image:
    picture = Image.fromarray(frame)
    picture.thumbnail((side, side))
    return picture


def _encoded(picture: Image.Image, form: str) -> bytes:
    written = io.BytesIO()
    picture.save(written, form)
    return written.getvalue()
