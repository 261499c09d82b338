"""Pictures from anyone's files: what becomes of their kinds, and what is refused in one line."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import struct
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from nabla import InputError
from wan.files.picture import MAX_PIXELS, check_picture, picture_hash, picture_of, read_picture

WIDTH, HEIGHT = 6, 4
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def halves(mode: str = "RGB") -> Image.Image:
    """Red above, blue below."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), RED)
    picture.paste(BLUE, (0, HEIGHT // 2, WIDTH, HEIGHT))
    return picture.convert(mode)


def saved(folder: Path, picture: Image.Image, ending: str = "png", **options: object) -> Path:
    path = folder / f"picture.{ending}"
    picture.save(path, **options)
    return path


def header_of(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and has no pixels."""
    chunks = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b""))
    parts = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in
             (*chunks, (b"IEND", b""))]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    "ending, options", (("png", {}), ("webp", {"lossless": True}), ("jpg", {"quality": 100}), ("jpeg", {}))
)
def test_each_format_gives_rows_of_red_green_and_blue(ending, options, tmp_path):
    path = saved(tmp_path, halves(), ending, **options)
    pixels = read_picture(path)
    assert pixels.shape == (HEIGHT, WIDTH, 3) and pixels.dtype == np.uint8 and pixels.flags.writeable
    assert check_picture(path) == (WIDTH, HEIGHT)
    assert np.abs(pixels[0].astype(int) - RED).max() < 80 and np.abs(pixels[-1].astype(int) - BLUE).max() < 80


@pytest.mark.parametrize("mode", ("P", "1", "L", "LA", "RGBA"))
def test_palettes_and_grey_are_what_pillow_makes_of_them(mode, tmp_path, caplog):
    caplog.set_level(logging.INFO, "wan")
    picture = halves(mode)
    assert (read_picture(saved(tmp_path, picture)) == np.asarray(picture.convert("RGB"))).all()
    assert caplog.messages == [f"image: {tmp_path}/picture.png, 6x4"]


@pytest.mark.parametrize("ending", ("jpg", "png", "webp"))
def test_a_picture_is_turned_as_its_exif_data_says(ending, tmp_path, caplog):
    caplog.set_level(logging.INFO, "wan")
    exif = Image.Exif()
    # Its first row is the right side.
    exif[0x0112] = 6
    path = saved(tmp_path, halves(), ending, exif=exif)
    assert check_picture(path) == (HEIGHT, WIDTH) and not caplog.messages
    pixels = read_picture(path)
    assert pixels.shape == (WIDTH, HEIGHT, 3)
    assert (pixels[:, 0].argmax(axis=1) == 2).all() and (pixels[:, -1].argmax(axis=1) == 0).all()
    assert caplog.messages == [f"image: {path}, 4x6, turned as its EXIF data says"]


def test_exif_data_that_says_nothing_known_turns_nothing(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 77
    assert (read_picture(saved(tmp_path, halves(), exif=exif)) == np.asarray(halves())).all()


def transparent(kind: str) -> tuple[Image.Image, dict[str, object]]:
    """A picture whose upper half is clear, and what it is saved with."""
    if kind == "channel":
        picture = halves("RGBA")
        picture.paste((255, 0, 0, 0), (0, 0, WIDTH, HEIGHT // 2))
        return picture, {}
    if kind == "palette":
        picture = Image.new("P", (WIDTH, HEIGHT), 0)
        picture.putpalette([*RED, *BLUE])
        picture.paste(1, (0, HEIGHT // 2, WIDTH, HEIGHT))
        return picture, {"transparency": 0}
    return halves(), {"transparency": RED}


@pytest.mark.parametrize("kind", ("channel", "palette", "colour"))
def test_what_is_transparent_lies_on_white_and_is_said(kind, tmp_path, caplog):
    caplog.set_level(logging.INFO, "wan")
    picture, options = transparent(kind)
    pixels = read_picture(saved(tmp_path, picture, **options))
    assert (pixels[: HEIGHT // 2] == WHITE).all() and (pixels[HEIGHT // 2 :] == BLUE).all()
    assert caplog.messages[0].endswith("6x4, transparent parts on white")


def test_half_transparent_is_halfway_to_white(tmp_path):
    pixels = read_picture(saved(tmp_path, Image.new("RGBA", (2, 2), (0, 0, 0, 127))))
    assert (pixels == 128).all()


def test_grey_of_16_bits_keeps_its_ends_and_its_transparent_value(tmp_path):
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    path = saved(tmp_path, Image.fromarray(values))
    assert read_picture(path)[0, :, 0].tolist() == [0, 1, 128, 255]
    picture = Image.fromarray(values)
    picture.info["transparency"] = 257
    assert picture_of(picture)[0, :, 0].tolist() == [0, 255, 128, 255]
    assert picture_of(Image.fromarray(values.astype(np.int32)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_cmyk_is_taken_and_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, "wan")
    pixels = read_picture(saved(tmp_path, halves("CMYK"), "jpg", quality=100))
    assert np.abs(pixels[0].astype(int) - RED).max() < 80
    assert caplog.messages[0].endswith("6x4, CMYK taken without a colour profile")


def cut(path: Path, content: bytes) -> None:
    path.write_bytes(content[: len(content) * 2 // 3])


@pytest.mark.parametrize("ending", ("png", "jpg", "webp"))
def test_a_file_that_is_cut_is_damaged(ending, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    path = saved(tmp_path, noise, ending)
    cut(path, path.read_bytes())
    with pytest.raises(InputError, match=r"is damaged \(.*\); save it anew|is no picture that can be read"):
        read_picture(path)


@pytest.mark.parametrize(
    "content, message",
    (
        (b"not a picture", r"picture.png is no picture that can be read; give a .png, .jpg or .webp"),
        (b"", "is no picture that can be read"),
        (b"GIF89a" + bytes(40), "is no picture that can be read"),
        (header_of(8193, 8192), rf"is 8193x8192, of more than {MAX_PIXELS} pixels; make it smaller"),
        (header_of(10000, 10000), "is 10000x10000, of more than"),
        (header_of(60000, 60000), f"has far more than {MAX_PIXELS} pixels, the most; make it smaller"),
        (header_of(0, 5), "is damaged|is no picture"),
        (header_of(5, 5), "is damaged"),
    ),
)
def test_what_is_no_picture_or_a_bomb_is_one_line(content, message, tmp_path, recwarn):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    for read in (read_picture, check_picture, picture_of):
        with pytest.raises(InputError, match=message) as error:
            read(path)
        assert "\n" not in str(error.value)
    assert not recwarn.list


@pytest.mark.parametrize("ending", ("png", "webp"))
def test_an_animated_file_is_refused(ending, tmp_path):
    path = saved(tmp_path, halves(), ending, save_all=True, append_images=[halves().rotate(180)])
    with pytest.raises(InputError, match=r"is animated; give one frame of it"):
        check_picture(path)


def test_of_a_camera_s_file_of_several_views_the_first_is_taken(tmp_path):
    path = tmp_path / "picture.jpg"
    halves().save(path, "MPO", save_all=True, append_images=[halves().rotate(180)], quality=100)
    assert read_picture(path)[0, 0].argmax() == 0


def test_places_without_a_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("", r"is a folder; give a .png"),
        ("pipe", "is no ordinary file"),
        ("missing.png", r"missing.png cannot be read \(No such file or directory\); give a .png"),
        ("x" * 300, r"cannot be read \(File name too long\)"),
        ("nul\0", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            read_picture(tmp_path / name)
    with pytest.raises(InputError, match="missing.png cannot be read"):
        picture_hash(tmp_path / "missing.png")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = saved(tmp_path, halves())
    path.chmod(0)
    if os.geteuid() == 0:
        # Root reads everything, so what the system says to others is said for it.
        refused = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        monkeypatch.setattr("wan.files.ordinary.open", Mock(side_effect=refused), raising=False)
    with pytest.raises(InputError, match="Permission denied"):
        read_picture(path)


def test_from_python_a_picture_is_a_path_an_image_or_an_array(tmp_path):
    path, expected = saved(tmp_path, halves()), np.asarray(halves())
    for given in (path, str(path), halves(), expected, Image.open(path)):
        assert (picture_of(given) == expected).all()
    for given, message in (
        (expected[..., 0], r"image of shape \(4, 6\), uint8; an array is \(height, width, 3\) uint8 RGB"),
        (expected.astype(np.float32), "float32"),
        (expected[:0], r"\(0, 6, 3\)"),
        (halves("F"), "floating point"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), "grey values from 70000 to 70000"),
        (b"bytes", "image bytes is no picture; give a path, a PIL image or an array"),
    ):
        with pytest.raises(InputError, match=message):
            picture_of(given)


def test_the_digest_is_the_file_s(tmp_path):
    path = saved(tmp_path, halves())
    assert picture_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()
