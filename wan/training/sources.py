"""Where clips come from: datasets by name, a folder of videos among them, and what is bad about a sample."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import imageio.v2 as imageio
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nabla import InputError
from nabla.config import is_number
from wan.config.checks import check_text, check_video, parse_size
from wan.config.prompts import clean_prompt
from wan.config.settings import VideoSettings
from wan.files.plain_data import parse_json
from wan.shapes.dataset import Shapes

CAPTIONS_FILE = "captions.jsonl"


class BadSample(InputError):
    """A sample that cannot be used; the message says why."""


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
            check_video(size, frame_num=1)
        for frame_num in frame_nums:
            check_video(VideoSettings().size, frame_num)
        self.frame_nums = sorted(frame_nums, reverse=True)
        captions = self.folder / CAPTIONS_FILE
        try:
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
            with contextlib.suppress(BadSample, OSError, ValueError):
                state = (self.folder / self._entry(index)[0]).stat()
                states.append((index, state.st_size, int(state.st_mtime)))
        return {"captions": _digest(repr([line for _, line in self.lines])), "files": _digest(repr(states))}

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        """(frames, H, W, 3) uint8 and its caption; raises `BadSample` for what cannot be read or used."""
        name, caption = self._entry(index)
        try:
            video = self._read(self.folder / name)
            _check(video, caption)
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
            raise BadSample(f"its {len(frames)} frames are fewer than {self.frame_nums[-1]}")
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
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
            filters.append(f"scale={width}:{height}:force_original_aspect_ratio=increase,crop={width}:{height}")
        output = ["-vf", ",".join(filters)] if filters else []
        frames = []
        with imageio.get_reader(path, "ffmpeg", output_params=output) as reader:
            for frame in reader:
                frames.append(frame)
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


# A dataset's name in a config -> what makes it of its options: indexable, giving (video, caption).
def shapes(
    count: int,
    seed: int = 0,
    size: str = "256*256",
    frame_num: int = 33,
    split: str = "train",
    offset: int = 0,
    rough: float = 0.0,
    turning: float = 0.0,
    several: float = 0.0,
    alike: float = 0.0,
    brief: float = 0.0,
) -> Shapes:
    """`count` clips of `Shapes`, beginning with number `offset`."""
    width, height = parse_size(size)
    check_video((width, height), frame_num)
    return Shapes(seed, count, (width, height), frame_num, split, offset, rough, turning, several, alike, brief)


DATASETS: dict[str, Callable[..., Any]] = {"videos": VideoFolder, "shapes": shapes}


def open_dataset(name: str, options: dict[str, Any]) -> Any:
    """The dataset of a name in `DATASETS`; raises `InputError` for another name or options that it does not have."""
    if name not in DATASETS:
        raise InputError(f"dataset {name!r} is not known; use one of {', '.join(DATASETS)}")
    try:
        inspect.signature(DATASETS[name]).bind(**options)
    except TypeError as error:
        takes = ", ".join(inspect.signature(DATASETS[name]).parameters)
        raise InputError(f"dataset {name}: {error}; its options are {takes}") from None
    return DATASETS[name](**options)


class InOrder:
    """Any iterable of (video, caption) as something indexable, as long as indices only rise.

    Raises `RuntimeError` where it raises `OSError` or `ValueError`.
    """

    def __init__(self, iterable: Iterable[tuple[np.ndarray, str]]):
        self.items = enumerate(iterable)

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        try:
            for number, item in self.items:
                if number == index:
                    return item
        except (OSError, ValueError) as error:
            # A generator that raised is at its end: to skip the sample would lose those after it.
            raise RuntimeError(
                f"sample {index}: an iterable cannot go on after an error; mend it, or index it"
            ) from error
        raise IndexError(index)


class Sample(NamedTuple):
    """One sample of a dataset as it is: `reason` says why it cannot be used, or is empty."""

    index: int
    video: Tensor | None = None
    caption: str = ""
    reason: str = ""


class Checked(Dataset):
    """A dataset whose bad samples are values that say why, rather than errors; None past its end."""

    def __init__(self, source: Any):
        self.source = source

    def __getitem__(self, index: int) -> Sample | None:
        if hasattr(self.source, "__len__") and index >= len(self.source):
            return None
        try:
            item = self.source[index]
            if not isinstance(item, (list, tuple)) or len(item) != 2:
                raise BadSample(f"a {type(item).__name__} is not a pair of a video and its caption")
            video, caption = np.asarray(item[0]), item[1]
            _check(video, caption)
        except (OSError, ValueError) as error:
            # Of an error that is not ours the type says the most.
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            return Sample(index, reason=kind + " ".join(str(error).split()))
        except IndexError:
            if hasattr(self.source, "__len__"):
                raise
            return None
        # Copied if it may not be written, of which torch warns.
        return Sample(index, torch.from_numpy(np.require(video, requirements="W")), caption)


def _check(video: np.ndarray, caption: object) -> None:
    """Raise `InputError` unless training can use a video and its caption."""
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
        raise BadSample(f"the video is {video.dtype} {video.shape}, not uint8 (frames, height, width, 3)")
    check_text("caption", caption)
    if not clean_prompt(caption):
        raise BadSample("the caption is empty")
    frames, height, width, _ = video.shape
    check_video((width, height), frames)
