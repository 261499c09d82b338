"""Pictures that videos begin with: anyone's files, read whole and upright, or refused in one line."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from nabla import InputError
from wan.files.hashes import file_hash
from wan.files.ordinary import check_ordinary, unreadable

log = logging.getLogger("wan")

# Of a picture, width times height: 8192 by 8192, which takes some 800 MB while it is read.
MAX_PIXELS = 1 << 26
FORMATS = ("PNG", "JPEG", "WEBP")
GIVE = "give a .png, .jpg or .webp"
# Of a grey value in 16 bits.
MOST_GREY = 0xFFFF


def read_picture(path: str | Path, name: str = "image", quiet: bool = False) -> np.ndarray:
    """(height, width, 3) uint8 RGB of a PNG, JPEG or WebP file, and a log line of what it is.

    It is turned as its EXIF data says; what is transparent lies on white; 16 bits become 8. Colour profiles are not
    applied, as programs of this field do not. The line says of the first two, and of CMYK, where they changed it.
    name: as messages call it; quiet: without the line
    Raises `InputError` for what is no such file, is damaged or animated, and beyond `MAX_PIXELS`.
    """
    pixels, notes = _read(path, name)
    if not quiet:
        _say(f"{name}: {path}", pixels, notes)
    return pixels


def check_picture(path: str | Path, name: str = "image") -> tuple[int, int]:
    """(width, height) of a picture as `read_picture` gives it; raises as that does, and says nothing."""
    height, width, _ = _read(path, name)[0].shape
    return width, height


def check_content(content: bytes, name: str, most: int = MAX_PIXELS) -> str:
    """Pillow's name of the format of a picture that was sent; raises as `read_picture` does, and says nothing.

    most: pixels, beyond which it is not decoded
    """
    with _blamed_on(name), Image.open(io.BytesIO(content), formats=FORMATS) as picture:
        width, height = picture.size
        _check_size(name, width, height, most)
        found = picture.format
        _pixels(picture, name)
    assert found is not None
    return found


def picture_of(given: Any, name: str = "image") -> np.ndarray:
    """(height, width, 3) uint8 RGB of a path, a PIL image or such an array itself. Raises as `read_picture` does."""
    if isinstance(given, (str, Path)):
        return read_picture(given, name)
    if isinstance(given, Image.Image):
        with _blamed_on(name):
            pixels, notes = _pixels(given, name)
        _say(f"{name}: given", pixels, notes)
        return pixels
    if not isinstance(given, np.ndarray):
        raise InputError(f"{name} {type(given).__name__} is no picture; give a path, a PIL image or an array")
    if given.ndim != 3 or given.shape[2] != 3 or given.dtype != np.uint8 or not given.size:
        raise InputError(f"{name} of shape {given.shape}, {given.dtype}; an array is (height, width, 3) uint8 RGB")
    _check_size(name, given.shape[1], given.shape[0])
    return given


def picture_hash(path: str | Path) -> str:
    """SHA-256 of a picture's file, as `sha256sum` gives it: pixels would differ between versions of decoders."""
    try:
        return file_hash(Path(path))
    except OSError as error:
        raise unreadable(f"image {path}", error, GIVE) from None


def _say(name: str, pixels: np.ndarray, notes: list[str]) -> None:
    height, width, _ = pixels.shape
    log.info("%s", ", ".join([name, f"{width}x{height}", *notes]))


def _read(path: str | Path, name: str) -> tuple[np.ndarray, list[str]]:
    name = f"{name} {path}"
    check_ordinary(path, name, GIVE)
    with _blamed_on(name), open(path, "rb") as file, Image.open(file, formats=FORMATS) as picture:
        return _pixels(picture, name)


@contextmanager
def _blamed_on(name: str) -> Iterator[None]:
    """Turn all that Pillow raises of a picture into one line."""
    with warnings.catch_warnings():
        # It warns of pictures that are refused here in any case.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            yield
        except (InputError, MemoryError):
            raise
        except UnidentifiedImageError:
            raise InputError(f"{name} is no picture that can be read; {GIVE}") from None
        except Image.DecompressionBombError:
            raise InputError(f"{name} has far more than {MAX_PIXELS} pixels, the most; make it smaller") from None
        # Its decoders raise whatever a damaged file brings them to: SyntaxError, struct.error, IndexError among others.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{name} is damaged ({reason}); save it anew, or give another") from error


def _check_size(name: str, width: int, height: int, most: int = MAX_PIXELS) -> None:
    if width * height > most:
        raise InputError(f"{name} is {width}x{height}, of more than {most} pixels; make it smaller")


def _pixels(picture: Image.Image, name: str) -> tuple[np.ndarray, list[str]]:
    """What `read_picture` gives of an image that may not be decoded yet, and what was changed in it."""
    _check_size(name, *picture.size)
    # MPO is a JPEG of a camera that has further views of the same picture behind the first.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise InputError(f"{name} is animated; give one frame of it, as a .png, .jpg or .webp")
    notes = []
    # The header is enough for the size; from here on it is decoded.
    picture.load()
    if picture.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
        picture = ImageOps.exif_transpose(picture)
        notes.append("turned as its EXIF data says")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        picture = _grey_of_16_bits(picture, name)
    elif picture.mode == "F":
        raise InputError(f"{name} has pixels of floating point, whose range is not known; convert it to RGB")
    if picture.mode == "CMYK":
        notes.append("CMYK taken without a colour profile")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        if picture.getchannel("A").getextrema()[0] < 255:
            notes.append("transparent parts on white")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    # A copy, since of Pillow's own memory the array could not be written to, of which torch warns.
    return np.array(picture.convert("RGB")), notes


def _grey_of_16_bits(picture: Image.Image, name: str) -> Image.Image:
    """Grey in 8 bits, with an alpha channel if one value of the 16 means transparent."""
    values = np.asarray(picture)
    least, most = int(values.min()), int(values.max())
    if least < 0 or most > MOST_GREY:
        raise InputError(f"{name} has grey values from {least} to {most}; convert it to 8 or 16 bits")
    grey = Image.fromarray(((values.astype(np.uint32) * 255 + MOST_GREY // 2) // MOST_GREY).astype(np.uint8))
    clear = picture.info.get("transparency")
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey
