"""What size a video has that is made of a picture or a video, by the form of that and an area; all are in pixels."""

from __future__ import annotations

import math

from nabla import InputError
from wan.config.geometry import Geometry
from wan.models.wan.geometry import GEOMETRY, GEOMETRY_5B

Size = tuple[int, int]


def as_asked(given: Size, asked: Size) -> Size:
    """The size that is asked for, whatever the size of what is given."""
    return asked


def fit_area(given: Size, asked: Size) -> Size:
    """That of a picture's form of about the area asked for, see `area_size`."""
    return area_size(given, asked[0] * asked[1])


def fit_within(given: Size, asked: Size) -> Size:
    """That of nearly a picture's form of at most the area asked for, see `best_output_size`."""
    return best_output_size(given, asked[0] * asked[1], GEOMETRY_5B.multiples)


def fit_source(source: Size, asked: Size, geometry: Geometry = GEOMETRY) -> Size:
    """(width, height) of a video of a source's form, (width, height), of at most the area of the one asked for.

    As VACE has it: with no more tokens than the source itself, so that it is never enlarged. Raises `InputError` for a
    source that is smaller than a token, or so narrow that nothing is left of it.
    """
    (width, height), (rows, columns) = source, geometry.multiples
    tokens = min(asked[0] * asked[1] // (rows * columns), (height // rows) * (width // columns))
    down = round(math.sqrt(tokens * (height / width)))
    across = tokens // down if down else 0
    if not across:
        raise InputError(
            f"a source video of {width}x{height} leaves nothing in steps of {columns}x{rows} pixels; give a larger "
            "one, or one less narrow"
        )
    return across * columns, down * rows


def area_size(picture: Size, max_area: int, geometry: Geometry = GEOMETRY) -> Size:
    """(width, height) of a video of a picture's form, (width, height), of about an area.

    As Wan2.1's image-to-video has it: each side is rounded down by itself. Raises `InputError` if one is left with
    nothing.
    """
    ratio = picture[1] / picture[0]
    # In this order, since roots that a rounding keeps below a whole number fall by a multiple: a picture of 832x480 in
    # an area of 832x480 gives 832x464, here and in the published program.
    exact = math.sqrt(max_area / ratio), math.sqrt(max_area * ratio)
    width, height = (
        int(side // stride // patch * patch) * stride
        for side, stride, patch in zip(exact, geometry.vae_stride[:0:-1], geometry.patch[:0:-1])
    )
    _check_left(picture, max_area, width, height)
    return width, height


def best_output_size(picture: Size, max_area: int, multiples: tuple[int, int]) -> Size:
    """(width, height) of a video of nearly a picture's form, (width, height), of at most an area.

    As Wan2.2's TI2V-5B has it: one side is rounded down, and the other is what the area then leaves; first the width
    or first the height, whichever comes nearer to the picture's form.
    multiples: (rows, columns) that the sides are whole multiples of
    Raises `InputError` if a side is left with nothing.
    """
    rows, columns = multiples
    ratio = picture[0] / picture[1]
    exact_width = (max_area * ratio) ** 0.5
    exact_height = max_area / exact_width
    width = int(exact_width // columns * columns)
    height = int(exact_height // rows * rows)
    _check_left(picture, max_area, width, height)
    by_width = width, int(max_area / width // rows * rows)
    by_height = int(max_area / height // columns * columns), height

    def stretch(size: Size) -> float:
        own = size[0] / size[1]
        return max(ratio / own, own / ratio)

    return by_width if stretch(by_width) < stretch(by_height) else by_height


def _check_left(picture: Size, max_area: int, width: int, height: int) -> None:
    if not width or not height:
        raise InputError(
            f"a picture of {picture[0]}x{picture[1]} leaves nothing of its {'height' if width else 'width'} in an area "
            f"of {max_area} pixels; give a picture less narrow, or a larger size"
        )
