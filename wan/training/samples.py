"""Samples of data sets to prepare, pairs of (video, caption): which of them cannot be used, and why."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nabla import InputError
from wan.config.checks import check_text
from wan.config.geometry import DEFAULT_GEOMETRY, Geometry
from wan.config.prompts import clean_prompt


class BadSample(InputError):
    """A sample that cannot be used; the message says why."""


class SequentialDataset:
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


class CheckedDataset(Dataset):
    """A dataset whose bad samples are values that say why, rather than errors; None past its end.

    geometry: of the models that are to see the samples, and how many frames each must have
    """

    def __init__(self, source: Any, geometry: Geometry = DEFAULT_GEOMETRY, least_frames: int = 1):
        self.source, self.geometry, self.least_frames = source, geometry, least_frames

    def __getitem__(self, index: int) -> Sample | None:
        # The last shard asks for as many as fit in it.
        if hasattr(self.source, "__len__") and index >= len(self.source):
            return None
        try:
            item = self.source[index]
            if not isinstance(item, (list, tuple)) or len(item) != 2:
                raise BadSample(f"a {type(item).__name__} is not a pair of a video and its caption")
            video, caption = np.asarray(item[0]), item[1]
            check_sample(video, caption, self.geometry)
            if len(video) < self.least_frames:
                raise BadSample(f"its frames are {len(video)}, and have to be {self.least_frames} or more")
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


def check_sample(video: np.ndarray, caption: Any, geometry: Geometry = DEFAULT_GEOMETRY) -> None:
    """Raise `InputError` unless training can use a video and its caption."""
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
        raise BadSample(f"the video is {video.dtype} {video.shape}, not uint8 (frames, height, width, 3)")
    check_text("caption", caption)
    if not clean_prompt(caption):
        raise BadSample("the caption is empty")
    frames, height, width, _ = video.shape
    geometry.check_video((width, height), frames)
