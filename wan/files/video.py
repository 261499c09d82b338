"""Writing videos and pictures with their sidecars: whole and together, or not at all."""

from __future__ import annotations

import errno
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import torch
from torch import Tensor

from nabla import InputError
from wan.files.atomic import scratch, settle, sync, written
from wan.files.hashes import file_hash
from wan.files.json_files import to_json

# Of H.264, from 0 to 51, the best first: imageio's quality 8.
RATE_FACTOR = 10
# What frames are written as: for people, in a form that every player shows. Of RGB frames libx264 would by default make
# 4:4:4, which browsers and many players do not.
H264 = ("-vcodec", "libx264", "-pix_fmt", "yuv420p", "-crf", str(RATE_FACTOR))
# And for programs, to the bit: every frame by itself, its slices with checksums; the same file for the same frames.
FFV1 = ("-vcodec", "ffv1", "-level", "3", "-g", "1", "-slicecrc", "1", "-pix_fmt", "gbrp", "-fflags", "+bitexact")
LOSSLESS = ".mkv"
# What a person can do about an encoder that does not work.
OTHER_ENCODER = "pip install imageio-ffmpeg, or let IMAGEIO_FFMPEG_EXE name an ffmpeg with libx264"


def make_folder(path: Path, name: str = "save_dir") -> None:
    """Make a folder, which a flag of this name gives, if it is not there; raises `InputError` if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{name} {path} cannot be made ({error.strerror or error}); choose another") from None


def check_writable(path: Path, flag: str = "--save_file") -> None:
    """Raise `InputError` unless a file can be written at `path`, which a flag names."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a directory")
        # The file of the trial has a short name, so the length of this one is looked at apart.
        if len(os.fsencode(path.name)) > os.pathconf(path.parent, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, "File name too long")
        # Tried under a name of its own, so that a file at `path` stays as it is.
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}); choose another {flag}") from None


def check_encoder(folder: Path | None = None) -> None:
    """Raise `InputError` unless ffmpeg can write H.264 into a folder, since to find out at the end costs the run.

    It is tried: an ffmpeg may lack H.264, or be kept from some folders though Python is not.
    folder: None for that of temporary files
    """
    _try_encoder(encoder(), Path(tempfile.gettempdir()) if folder is None else folder.absolute())


# Once for each folder: every video of a list is checked.
@functools.cache
def _try_encoder(ffmpeg: str, folder: Path) -> None:
    with _drafts_of(folder / "a video", "choose another folder") as own:
        _encode(ffmpeg, own / "trial.mp4", np.zeros((2, 16, 16, 3), np.uint8), 16)


def encoder() -> str:
    """The ffmpeg that writes videos; raises `InputError` if there is none."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe

        return get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise InputError(f"videos need ffmpeg, and there is none; {OTHER_ENCODER}") from None


def write_video(path: Path, video: np.ndarray, fps: int, flag: str = "--save_file") -> None:
    """Write (frames, height, width, 3) uint8 as H.264 mp4. Raises `InputError` if that fails; flag: names the path."""
    with _drafts_of(path, f"free some space, or choose another {flag}") as folder:
        draft = folder / path.name
        _encode(encoder(), draft, video, fps)
        settle(draft)
        os.replace(draft, path)


def write_lossless(path: Path, video: np.ndarray, fps: int, flag: str = "--out") -> None:
    """Write (frames, height, width, 3) uint8 to a path that ends in `LOSSLESS`, so that `SourceVideo` reads the same.

    Raises `InputError` if that fails; flag: names the path.
    """
    with _drafts_of(path, f"free some space, or choose another {flag}") as folder:
        draft = folder / path.name
        _encode(encoder(), draft, video, fps, FFV1)
        settle(draft)
        os.replace(draft, path)


def write_image(path: Path, image: np.ndarray) -> None:
    """Write (height, width, 3) uint8 in the format of the path's ending."""
    with _drafts_of(path, "free some space, or choose another --save_file") as folder:
        draft = folder / path.name
        imageio.imwrite(draft, image)
        settle(draft)
        os.replace(draft, path)


def write_with_sidecar(path: Path, frames: np.ndarray, fps: int, sidecar: dict[str, Any]) -> None:
    """Write a video, or with a path ending in .png its first frame, and its sidecar beside it as JSON.

    frames: (frames, height, width, 3) uint8
    The sidecar says which file it is of, by name and digest. Both are whole and on the disk before either takes its
    place, the sidecar first: a video without one could be anybody's, a sidecar without its video is only not made yet.
    """
    with _drafts_of(path, "free some space, or choose another place") as folder:
        draft, notes = folder / path.name, folder / sidecar_of(path).name
        if path.suffix == ".png":
            imageio.imwrite(draft, frames[0])
        else:
            _encode(encoder(), draft, frames, fps)
        notes.write_text(to_json(sidecar | {"file": {"name": path.name, "sha256": file_hash(draft)}}), encoding="utf-8")
        settle(folder)
        os.replace(notes, sidecar_of(path))
        os.replace(draft, path)
        sync(path.parent)


def sidecar_of(path: Path) -> Path:
    """Where the sidecar of a video stands."""
    return path.with_suffix(".json")


def to_frames(video: Tensor) -> np.ndarray:
    """(3, frames, height, width) in [-1, 1] -> (frames, height, width, 3) uint8, rounded down as published."""
    frames = ((video.float().clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).permute(1, 2, 3, 0)
    # In order before it leaves a GPU, where that takes no time beside what it takes a CPU.
    return frames.contiguous().cpu().numpy()


class EncoderError(Exception):
    """The encoder did not end well, or wrote something else than it was given."""


def _encode(ffmpeg: str, path: Path, video: np.ndarray, fps: int, codec: Sequence[str] = H264) -> None:
    """Have ffmpeg write (frames, height, width, 3) uint8, and look at how it ended and what is in the file.

    Not by imageio, which looks at neither. Raises `EncoderError` and `OSError`.
    """
    count, height, width, _ = video.shape
    command = [ffmpeg, "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-r", str(fps), "-i", "-", "-an", *codec, str(path.absolute())]
    # In a session of its own: Ctrl-C is for the program, which then ends it.
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "start_new_session": True}
    # Its messages go to a file: with a pipe that nobody reads, ffmpeg would wait once that is full.
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=said, **quiet)
        except OSError as error:
            raise EncoderError(f"encoder {ffmpeg} cannot be started ({error.strerror or error})") from error
        frames = process.stdin
        assert frames is not None
        try:
            # Closing its stdin tells ffmpeg that no more frames come.
            with frames:
                for frame in video:
                    # The frame's own memory, not a copy in bytes.
                    frames.write(np.ascontiguousarray(frame).data)
        except BrokenPipeError:
            # It has ended, and its exit code says why.
            pass
        except BaseException:
            # Ctrl-C and signals among them: no encoder goes on without its program.
            process.kill()
            raise
        finally:
            code = process.wait()
        said.seek(0)
        last = (said.read().decode(errors="replace").strip().splitlines() or [""])[-1]
    if code != 0:
        raise EncoderError(f"encoder {ffmpeg} ended with code {code}" + (f": {last}" if last else ""))
    found = count_frames(path)
    if found != count:
        raise EncoderError(f"encoder {ffmpeg} wrote {found} frames of {count}")


def count_frames(path: Path) -> int:
    """How many frames of a video can be read."""
    from imageio_ffmpeg import count_frames_and_secs

    try:
        return count_frames_and_secs(path)[0]
    except RuntimeError:
        return 0


@contextmanager
def _drafts_of(path: Path, remedy: str) -> Iterator[Path]:
    """A folder for what is to become a file; raises `InputError` if that cannot be written."""
    # Around the folder for what it raises itself, and within it since a draft, while it is there, may fill the disk.
    with _blamed_on_file(path, remedy), scratch(path.parent) as folder, _blamed_on_file(path, remedy):
        yield folder


@contextmanager
def _blamed_on_file(path: Path, remedy: str) -> Iterator[None]:
    """Say in one line that a file cannot be written, or that the encoder is at fault."""
    try:
        with written(path, remedy):
            yield
    except EncoderError as error:
        # The exit code does not tell a full disk from an ffmpeg that lacks something.
        full = f"; {remedy}" if _is_full(path.parent) else f"; {OTHER_ENCODER}, or {remedy}"
        raise InputError(f"{path} could not be written: {error}{full}") from error


def _is_full(folder: Path) -> bool:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize < 2**20
