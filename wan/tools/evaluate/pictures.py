"""What people look at: a sheet of frames of all settings, and videos of them side by side."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nabla import InputError
from wan.files.video import make_folder, write_image, write_video
from wan.tools.evaluate.compared import Compared
from wan.tools.evaluate.folder import Folder
from wan.tools.evaluate.jobs import Job
from wan.tools.evaluate.making import Task
from wan.tools.evaluate.measuring import read_frames

log = logging.getLogger("wan")

# Pixels: of a frame on the sheet, of one beside others at the most, and of lines of text above.
SHEET_HEIGHT, BESIDE_HEIGHT, LINE = 144, 480, 20
FONT_SIZE, MARGIN = 13, 4
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def draw_sheet(compared: Sequence[Compared], jobs: Sequence[Job], folder: Folder) -> bool:
    """Write first, middle and last frames of jobs, a row a setting, as a PNG; whether there was anything to show."""
    columns = [found for job in jobs if (found := _strips(compared, job, folder))]
    if not columns:
        return False
    parts = [_labels([one.name for one in compared])]
    for prompt, strips in columns:
        width = max(strip.shape[1] for strip in strips) + MARGIN
        parts.append(np.concatenate([_text(prompt, width), *(_padded(strip, width) for strip in strips)]))
    write_image(folder.sheet, np.concatenate(parts, axis=1))
    return True


def _strips(compared: Sequence[Compared], job: Job, folder: Folder) -> tuple[str, list[np.ndarray]] | None:
    """A job's prompt and, of each setting, frames side by side, grey where it has no video; None if none has."""
    middle = job.settings.video.frame_num // 2
    # One frame is all three.
    numbers = sorted({0, middle, job.settings.video.frame_num - 1})
    found = [_frames_of(Task(one, job), folder, numbers) for one in compared]
    shapes = [one.shape for one in found if one is not None]
    if not shapes:
        return None
    grey = np.full(shapes[0], 128, np.uint8)
    return job.settings.prompt or "", [grey if one is None else one for one in found]


def _frames_of(task: Task, folder: Folder, numbers: Sequence[int]) -> np.ndarray | None:
    """Some frames of a video side by side, `SHEET_HEIGHT` high; None if it is not there."""
    if not folder.frames(*task).is_file():
        return None
    try:
        frames = _scaled(read_frames(folder, task, numbers), SHEET_HEIGHT)
    except InputError as error:
        log.warning("warning: %s is not on the sheet: %s", task.job.name, error)
        return None
    return torch.cat(list(frames), 1).numpy()


def _scaled(frames: Tensor, height: int) -> Tensor:
    """uint8 frames (frames, H, W, 3) of another height, an even number of pixels wide."""
    width = max(2, round(frames.shape[2] * height / frames.shape[1] / 2) * 2)
    channels_first = frames.permute(0, 3, 1, 2).float()
    small = F.interpolate(channels_first, size=(height, width), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _padded(strip: np.ndarray, width: int) -> np.ndarray:
    return np.pad(strip, ((0, 0), (0, width - strip.shape[1]), (0, 0)), constant_values=255)


def _text(text: str, width: int, height: int = LINE) -> np.ndarray:
    """A line of text, black on white, (height, width, 3) uint8; cut where the width ends."""
    picture = Image.new("RGB", (width, height), WHITE)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
    draw.text((MARGIN, height / 2), text, fill=BLACK, font=font, anchor="lm")
    return np.asarray(picture)


def _labels(names: Sequence[str]) -> np.ndarray:
    """The names of rows, as wide as the longest."""
    font = ImageFont.load_default(FONT_SIZE)
    width = int(max(font.getlength(name) for name in names)) + 2 * MARGIN
    return np.concatenate([_text("", width), *(_text(name, width, SHEET_HEIGHT) for name in names)])


def write_beside(compared: Sequence[Compared], jobs: Sequence[Job], folder: Folder) -> int:
    """Write a video of each job that shows all settings that have it side by side, named; how many there are."""
    make_folder(folder.beside, "out")
    return sum(_write_one(compared, job, folder) for job in jobs)


def _write_one(compared: Sequence[Compared], job: Job, folder: Folder) -> bool:
    shown = []
    height = min(BESIDE_HEIGHT, job.settings.video.size[1]) // 2 * 2
    for one in compared:
        if folder.frames(one, job).is_file():
            try:
                frames = _scaled(read_frames(folder, Task(one, job)), height).numpy()
            except InputError as error:
                log.warning("warning: %s is not shown beside others: %s", job.name, error)
                return False
            name = np.broadcast_to(_text(one.name, frames.shape[2]), (len(frames), LINE, frames.shape[2], 3))
            shown.append(np.concatenate((name, frames), axis=1))
    if len(shown) < 2:
        return False
    write_video(folder.beside / f"{job.name}.mp4", np.concatenate(shown, axis=2), job.settings.video.fps, "--out")
    return True
