"""Videos that others are made of: anyone's files, or arrays, of which the frames that are wanted are read."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nabla import InputError
from nabla.checks import is_number
from wan.files.ordinary import check_ordinary
from wan.files.picture import MAX_PIXELS, check_picture, read_picture
from wan.files.video import encoder

# Over five minutes at 30 a second, of which a video takes some hundred.
MAX_FRAMES = 10_000
GIVE = "give an .mp4 that plays"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
# Of a video in an array, which is not told how fast it is.
USUAL_FPS = 16.0


class SourceVideo:
    """A video in memory, (frames, height, width, 3) uint8, at so many frames a second; or one of a file, by `open`.

    name: as messages call it
    size: (width, height), as it is shown; count: of its frames
    is_still: whether it is one picture, which stands for any number of frames
    """

    is_still = False

    def __init__(self, frames: Any, fps: float = USUAL_FPS, name: str = "src_video"):
        if not isinstance(frames, np.ndarray) or frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
            what = f"{frames.shape}, {frames.dtype}" if isinstance(frames, np.ndarray) else type(frames).__name__
            raise InputError(f"{name} is {what}; give a path, or an array (frames, height, width, 3) uint8 RGB")
        if not is_number(fps) or fps <= 0:
            raise InputError(f"{name} has fps {fps!r}, which must be a positive number of frames a second")
        count, height, width, _ = frames.shape
        self._frames = frames
        self._set(name, (width, height), count, fps)

    def _set(self, name: str, size: tuple[int, int], count: int, fps: float) -> None:
        self.name, self.size, self.count, self.fps = name, size, count, float(fps)
        if not count or not min(size):
            raise InputError(f"{name} has no frames; {GIVE}")
        if size[0] * size[1] > MAX_PIXELS:
            raise InputError(f"{name} is {size[0]}x{size[1]}, of more than {MAX_PIXELS} pixels; make it smaller")
        if count > MAX_FRAMES:
            raise InputError(f"{name} has more than {MAX_FRAMES} frames; cut out the part that is meant")

    @classmethod
    def open(cls, path: str | Path, name: str = "src_video") -> SourceVideo:
        """That of a file, of which no frame is kept. Raises `InputError` for what is no whole video."""
        return _VideoFile(Path(path), name)

    def take(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames (height, width, 3) uint8 by their numbers, which rise, one after the other."""
        for number in numbers:
            yield self._frames[number]


class Still(SourceVideo):
    """One picture (height, width, 3) uint8 in place of as many frames as are asked for."""

    is_still = True

    def __init__(self, picture: np.ndarray, name: str):
        super().__init__(picture[None], name=name)

    def take(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        for _ in numbers:
            yield self._frames[0]


class _VideoFile(SourceVideo):
    """A file that ffmpeg reads, each time from its beginning, at a steady rate."""

    def __init__(self, path: Path, name: str):
        self.path, name = path, f"{name} {path}"
        check_ordinary(path, name, GIVE)
        size, fps = _look_at(path, name)
        # Looked at for its size first, which decoding already takes memory for.
        self._set(name, size, 1, fps)
        # In two by two pixels, since frames are counted only by reading them all.
        count = sum(1 for _ in _decode(path, name, (2, 2), most=MAX_FRAMES + 1))
        self._set(name, size, count, fps)

    def take(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        return frames_of(self.path, self.name, self.size, numbers)


def frames_of(path: Path, name: str, size: tuple[int, int], numbers: Sequence[int]) -> Iterator[np.ndarray]:
    """Frames (height, width, 3) uint8 by their numbers, which rise, of a file whose video is known to be of this size.

    name: as messages call it. Raises `InputError` for a file that is damaged, or shorter.
    """
    check_ordinary(path, name, GIVE)
    wanted, found = set(numbers), 0
    for number, frame in enumerate(_decode(path, name, size, most=max(numbers) + 1)):
        if number in wanted:
            found += 1
            yield frame
    if found < len(wanted):
        raise InputError(f"{name} has become another file while it was read; run again")


def video_of(given: Any, name: str = "src_video") -> SourceVideo:
    """A video that is given as a path, as an array (frames, height, width, 3) uint8, or as one already.

    Raises `InputError` for what is none or cannot be read.
    """
    if isinstance(given, SourceVideo):
        return given
    return SourceVideo.open(given, name) if isinstance(given, (str, Path)) else SourceVideo(given, name=name)


def mask_of(given: Any, name: str = "src_mask", quiet: bool = False) -> SourceVideo:
    """The same of a mask, which may be one picture for all frames: a file of one, or (height, width, 3) uint8.

    quiet: without the log line that says what a picture is
    """
    if isinstance(given, (str, Path)) and Path(given).suffix.lower() in PICTURES:
        return Still(read_picture(given, name, quiet), f"{name} {given}")
    if isinstance(given, np.ndarray) and given.ndim == 3 and given.shape[2] == 3 and given.dtype == np.uint8:
        return Still(given, name)
    return video_of(given, name)


def size_of_video(path: str, name: str) -> tuple[int, int]:
    """(width, height) of the file of a source or a mask; raises as `video_of` and `mask_of` do."""
    if name == "src_mask" and Path(path).suffix.lower() in PICTURES:
        return check_picture(path, name)
    return SourceVideo.open(path, name).size


def check_pair(video: SourceVideo | None, mask: SourceVideo | None) -> None:
    """Raise `InputError` for a mask without a video, or of another size or number of frames than it."""
    if mask is None:
        return
    if video is None:
        raise InputError(f"{mask.name} says which parts of a source video are made anew; give that as src_video")
    if mask.size != video.size:
        own, other = ("x".join(map(str, one.size)) for one in (mask, video))
        raise InputError(f"{mask.name} is {own}, and {video.name} {other}; a mask must be of its video's size")
    if not mask.is_still and mask.count != video.count:
        raise InputError(
            f"{mask.name} has {mask.count} frames, and {video.name} {video.count}; a mask must have as many, or be a "
            "picture"
        )


def _url(path: Path) -> str:
    # Else ffmpeg takes a name with a colon for an address, and one with a dash for an option.
    return f"file:{path.absolute()}"


def _look_at(path: Path, name: str) -> tuple[tuple[int, int], float]:
    """(width, height) as a file's video is shown, and its frames a second."""
    from imageio_ffmpeg import read_frames

    encoder()
    reader = read_frames(_url(path), input_params=["-protocol_whitelist", "file"])
    try:
        found = next(reader)
    # A damaged file brings it to nearly any error.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise InputError(f"{name} is no video that can be read ({reason}); {GIVE}") from None
    finally:
        reader.close()
    width, height = found["size"]
    # 0 where a file does not say.
    return (width, height), found["fps"] or USUAL_FPS


def _decode(path: Path, name: str, size: tuple[int, int], most: int) -> Iterator[np.ndarray]:
    """At most so many first frames of a file's video, (height, width, 3) uint8 each, scaled to (width, height).

    Not by imageio, which does not look at how ffmpeg ended. Raises `InputError` for damage before the last of them.
    """
    width, height = size
    command = [encoder(), "-v", "error", "-xerror", "-protocol_whitelist", "file", "-i", _url(path), "-map", "0:v:0"]
    command += ["-vf", f"scale={width}:{height}", "-frames:v", str(most), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "start_new_session": True}
    # Its messages go to a file: with a pipe that nobody reads, ffmpeg would wait once that is full.
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, **quiet)
        frames = process.stdout
        assert frames is not None
        try:
            while len(data := frames.read(width * height * 3)) == width * height * 3:
                yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
        except BaseException:
            # Whoever has enough closes this generator; no decoder goes on without its program.
            process.kill()
            raise
        finally:
            frames.close()
            code = process.wait()
        if code != 0:
            said.seek(0)
            reason = (said.read().decode(errors="replace").strip().splitlines() or [f"code {code}"])[-1]
            raise InputError(f"{name} is damaged ({reason}); save it anew, or give another")
