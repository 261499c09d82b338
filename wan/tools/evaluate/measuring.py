"""What videos measure: likeness to the dense ones and to their prompts, each measured once and kept in a file."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nabla import InputError
from wan.files.json_files import write_json
from wan.files.plain_data import read_json
from wan.files.source_video import frames_of
from wan.files.video import sidecar_of
from wan.tools.evaluate.clip_score import ClipScore, load_clip
from wan.tools.evaluate.compared import DENSE
from wan.tools.evaluate.folder import Folder
from wan.tools.evaluate.likeness import Lpips, Unavailable, load_lpips, psnr, ssim
from wan.tools.evaluate.making import Task

log = logging.getLogger("wan")


@dataclass
class Instruments:
    """What measures videos, on a device. missing: why others do not, by their names"""

    device: torch.device
    lpips: Lpips | None = None
    clip: ClipScore | None = None
    missing: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, device: torch.device, clip: str | None) -> Instruments:
        """All that can be had; clip: the directory or hub id of a CLIP."""
        found = cls(device)
        loads: dict[str, Callable[[], Any]] = {
            "lpips": lambda: load_lpips(device),
            "clip": lambda: load_clip(clip, device),
        }
        for name, load in loads.items():
            try:
                setattr(found, name, load())
            except Unavailable as error:
                found.missing[name] = str(error)
                log.warning("warning: no %s: %s", name.upper(), error)
        return found

    def how(self, is_baseline: bool) -> dict[str, str]:
        """By what each measure is taken, of those that a video has: likeness is that to the baseline's."""
        own = {} if self.clip is None else {"clip": self.clip.how}
        if is_baseline:
            return own
        likeness = {"psnr": "whole video", "ssim": "Gaussian window of 11"}
        return likeness | ({} if self.lpips is None else {"lpips": self.lpips.how}) | own

    def measure(self, name: str, video: Tensor, dense: Tensor | None, prompt: str) -> float:
        """One of `how` of a uint8 video (frames, H, W, 3), beside the baseline's."""
        if name == "clip":
            assert self.clip is not None
            return self.clip(video, prompt)
        assert dense is not None, "all others compare with the baseline"
        if name == "lpips":
            assert self.lpips is not None
            return self.lpips(video, dense)
        return {"psnr": psnr, "ssim": ssim}[name](video, dense, self.device)


def measure_all(tasks: Sequence[Task], folder: Folder, instruments: Instruments) -> None:
    """Measure what of the videos of tasks that are there was not measured yet, or by something else."""
    wanted = [(task, names) for task in tasks if (names := _unmeasured(task, folder, instruments))]
    start = time.perf_counter()
    for number, (task, names) in enumerate(wanted, 1):
        _measure(task, names, folder, instruments)
        each = (time.perf_counter() - start) / number
        left = tqdm.format_interval(each * (len(wanted) - number))
        log.info("measured: %d of %d, %.1f s a video, %s left", number, len(wanted), each, left)


def read_record(folder: Folder, task: Task) -> dict[str, Any] | None:
    """What the record of a video says, or None where that was not made."""
    path = sidecar_of(folder.video(*task))
    return read_json(path) if path.is_file() and folder.video(*task).is_file() else None


def read_measures(folder: Folder, task: Task) -> dict[str, Any]:
    """The measures of a video by their names, with `of` and `how`; empty before there are any of these frames."""
    path = folder.measures(*task)
    found = read_json(path) if path.is_file() else {}
    return found if found.get("of") == _digests(folder, task) else {}


def _digests(folder: Folder, task: Task) -> dict[str, str | None]:
    """Which frames are measured, and beside which."""
    every = {"frames": task, "dense": Task(DENSE, task.job)}
    records = {name: read_record(folder, one) for name, one in every.items()}
    return {name: record and record["evaluation"]["frames"]["sha256"] for name, record in records.items()}


def _unmeasured(task: Task, folder: Folder, instruments: Instruments) -> list[str]:
    if None in _digests(folder, task).values():
        return []
    known = read_measures(folder, task).get("how", {})
    return [name for name, how in instruments.how(task.compared.is_baseline).items() if known.get(name) != how]


def _measure(task: Task, names: Sequence[str], folder: Folder, instruments: Instruments) -> None:
    job = task.job
    try:
        video = read_frames(folder, task)
        likeness = not task.compared.is_baseline and set(names) - {"clip"}
        dense = read_frames(folder, Task(DENSE, job)) if likeness else None
    except InputError as error:
        log.warning("warning: %s of %s, %s is not measured: %s", ", ".join(names), task.compared.name, job.name, error)
        return
    found = {name: instruments.measure(name, video, dense, job.settings.text) for name in names}
    known = read_measures(folder, task)
    how = known.get("how", {}) | {name: instruments.how(task.compared.is_baseline)[name] for name in names}
    write_json(folder.measures(*task), {**known, **found, "of": _digests(folder, task), "how": how})


def read_frames(folder: Folder, task: Task, numbers: Sequence[int] | None = None) -> Tensor:
    """The uint8 frames (frames, H, W, 3) of a video, or those of some numbers, which rise.

    Raises `InputError` if they are gone or damaged.
    """
    path, video = folder.frames(*task), task.job.settings.video
    wanted = range(video.frame_num) if numbers is None else numbers
    return torch.from_numpy(np.stack(list(frames_of(path, f"frames {path}", video.size, wanted))))
