"""A folder of videos and captions as a data set to prepare."""

from __future__ import annotations

import codecs
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np

from nabla import InputError
from nabla.checks import is_number
from wan.config.checks import parse_size
from wan.config.geometry import DEFAULT_GEOMETRY
from wan.config.settings import VideoSettings
from wan.files.hashes import text_hash
from wan.files.plain_data import parse_json
from wan.training.samples import BadSample, check_sample

CAPTIONS_FILE = "captions.jsonl"


class VideoFolder:
    """A folder with videos, and captions in `captions.jsonl`: {"file": "a.mp4", "caption": "..."} a line.

    sizes: "width*height" of what is made of them: each video is scaled and cropped about its centre to the one nearest
        in shape that it is large enough for. Without any, videos keep their size
    frame_nums: 4n+1 each; the first frames of a video are taken, as many as the largest of these that it has. Without
        any, all are
    fps: frames a second to resample to, or None for those of each video
    """

    def __init__(
        self, folder: str, sizes: Sequence[str] = (), frame_nums: Sequence[int] = (), fps: float | None = None
    ):
        if not isinstance(folder, (str, Path)) or not str(folder) or "\0" in str(folder):
            raise InputError(f"folder {folder!r} is not a path; put it in quotes")
        for name, values in (("sizes", sizes), ("frame_nums", frame_nums)):
            if not isinstance(values, (list, tuple)):
                raise InputError(f"{name} {values!r} is not a list")
        if fps is not None and not (is_number(fps) and fps > 0):
            raise InputError(f"fps {fps!r} is not a positive number; 16 is usual")
        self.folder, self.fps = Path(folder).expanduser(), fps
        self.sizes = [parse_size(size) for size in sizes]
        for size in self.sizes:
            DEFAULT_GEOMETRY.check_video(size, frame_num=1)
        for frame_num in frame_nums:
            # Any size that is allowed, to have the number of frames checked.
            DEFAULT_GEOMETRY.check_video(VideoSettings().size, frame_num)
        self.frame_nums = sorted(frame_nums, reverse=True)
        captions = self.folder / CAPTIONS_FILE
        try:
            # Split before they are decoded, so that one in another encoding costs no others. Windows' editors begin
            # with a mark.
            lines = captions.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
        except OSError as error:
            raise InputError(f"{captions} cannot be read ({error}); write a JSON object a video into it") from None
        # By their numbers in the file.
        self.lines = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]

    def __len__(self) -> int:
        return len(self.lines)

    def fingerprints(self) -> dict[str, str]:
        """What tells its captions from others, and its files, by their names, sizes and times of change."""
        states = []
        for index in range(len(self)):
            # What cannot be read is skipped here, as it is when it is prepared.
            with contextlib.suppress(BadSample, OSError, ValueError):
                state = (self.folder / self._entry(index)[0]).stat()
                states.append((index, state.st_size, int(state.st_mtime)))
        return {"captions": _digest(repr([line for _, line in self.lines])), "files": _digest(repr(states))}

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        """(frames, H, W, 3) uint8 and its caption; raises `BadSample` for what cannot be read or used."""
        name, caption = self._entry(index)
        try:
            video = self._read(self.folder / name)
            check_sample(video, caption)
        except InputError as error:
            raise BadSample(f"{name}: {error}") from None
        return video, caption

    def _entry(self, index: int) -> tuple[str, Any]:
        """The file's name and the caption of a line."""
        number, line = self.lines[index]
        try:
            entry = parse_json(line.decode("utf-8"))
            return str(Path(entry["file"])), entry["caption"]
        except UnicodeDecodeError as error:
            raise BadSample(f"line {number} is not UTF-8 from byte {error.start + 1} on; save it as UTF-8") from None
        except (ValueError, KeyError, TypeError) as error:
            raise BadSample(f'line {number} is not {{"file": "...", "caption": "..."}} ({error!r})') from None

    def _read(self, path: Path) -> np.ndarray:
        most = self.frame_nums[0] if self.frame_nums else None
        frames = read_frames(path, self._choose_size, self.fps, most)
        if not self.frame_nums:
            return frames
        possible = [n for n in self.frame_nums if n <= len(frames)]
        if not possible:
            rate = "" if self.fps is None else f" at {self.fps:g} a second"
            raise BadSample(f"its {len(frames)} frames{rate} are fewer than {self.frame_nums[-1]}")
        return frames[: possible[0]]

    def _choose_size(self, own: tuple[int, int]) -> tuple[int, int] | None:
        if not self.sizes:
            return None
        possible = [size for size in self.sizes if size[0] <= own[0] and size[1] <= own[1]]
        if not possible:
            raise BadSample(f"{own[0]}*{own[1]} is smaller than any of the sizes")
        # The nearest in shape, and of those the largest.
        return min(possible, key=lambda size: (abs(np.log(size[0] * own[1] / size[1] / own[0])), -size[0]))


def _digest(text: str) -> str:
    return text_hash(text)[:16]


@contextlib.contextmanager
def _resizing() -> Iterator[None]:
    """Without the decoder's warning that frames are not of the size in their file, which is what is asked for."""

    def is_other(record: logging.LogRecord) -> bool:
        return "frame size for reading" not in record.getMessage()

    logger = logging.getLogger("imageio_ffmpeg")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


@_resizing()
def read_frames(
    path: Path,
    choose_size: Callable[[tuple[int, int]], tuple[int, int] | None] = lambda own: None,
    fps: float | None = None,
    most: int | None = None,
) -> np.ndarray:
    """The first frames of a video, (frames, H, W, 3) uint8; raises `BadSample` if it cannot be read.

    choose_size: from a video's own (width, height) to those to scale and crop to, or None
    """
    try:
        with imageio.get_reader(path, "ffmpeg") as reader:
            # As it is shown, which for a telephone's upright video is not as it is stored.
            own = reader.get_meta_data()["size"]
        size = choose_size(own)
        filters = [] if fps is None else [f"fps={fps}"]
        if size is not None:
            width, height = size
            # Until both sides are large enough; without a place, ffmpeg crops about the centre.
            filters.append(f"scale={width}:{height}:force_original_aspect_ratio=increase,crop={width}:{height}")
        output = ["-vf", ",".join(filters)] if filters else []
        frames = []
        with imageio.get_reader(path, "ffmpeg", output_params=output) as reader:
            for frame in reader:
                frames.append(frame)
                # The rest of a long video is not decoded.
                if len(frames) == most:
                    break
    except BadSample:
        raise
    except Exception as error:  # a damaged file makes the decoder raise nearly anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadSample(f"cannot be read ({reason})") from None
    if not frames:
        raise BadSample("has no frames")
    return np.stack(frames)
