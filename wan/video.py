"""Writing videos, pictures and their settings, each file whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import torch
from torch import Tensor

from nabla import InputError

# imageio-ffmpeg's scale from 0 to 10.
QUALITY = 8


def make_folder(path: Path, name: str = "save_dir") -> None:
    """Make a folder, which a flag of this name gives, if it is not there; raises `InputError` if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{name} {path} cannot be made ({error.strerror or error}); choose another") from None


def check_writable(path: Path, flag: str = "--save_file", prefix: str = "") -> None:
    """Raise `InputError` unless a file can be written at `path`, which a flag names; at first with a prefix."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a directory")
        if len(os.fsencode(prefix + path.name)) > os.pathconf(path.parent, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, "File name too long")
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _refusal(path, error, flag) from None


def check_encoder() -> None:
    """Raise `InputError` unless there is an ffmpeg to write videos with, since to find out at the end costs the run."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise InputError("videos need ffmpeg, and there is none; pip install imageio-ffmpeg") from None


def write_video(path: Path, video: np.ndarray, fps: int) -> None:
    """Write (frames, height, width, 3) uint8 as H.264 mp4."""
    with _whole(path) as partial:
        imageio.mimwrite(partial, video, fps=fps, codec="libx264", quality=QUALITY, macro_block_size=None)


def write_image(path: Path, image: np.ndarray) -> None:
    """Write (height, width, 3) uint8 in the format of the path's ending."""
    with _whole(path) as partial:
        imageio.imwrite(partial, image)


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with _whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def to_frames(video: Tensor) -> np.ndarray:
    """(3, frames, height, width) in [-1, 1] -> (frames, height, width, 3) uint8, rounded down as published."""
    return ((video.float().clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it if the body succeeds and vanishes if it does not."""
    try:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
            partial = Path(folder) / f"file{path.suffix}"
            yield partial
            os.replace(partial, path)
    except OSError as error:
        raise _refusal(path, error) from error


def _refusal(path: Path, error: OSError, flag: str = "--save_file") -> InputError:
    return InputError(f"{path} cannot be written ({error.strerror or error}); choose another {flag}")
