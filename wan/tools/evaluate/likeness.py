"""How much a video is like another: PSNR, SSIM and LPIPS, some frames at a time."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from wan.run.versions import installed_versions
from wan.tools import quality

# Equal videos, and such as differ by less than any encoder does, have this.
MOST_DB = 100.0
# Numbers of a video that are looked at at once.
CHUNK = 2**23
LPIPS_NET = "alex"


def _chunks(video: Tensor, other: Tensor, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Two uint8 videos (frames, H, W, 3), some frames at a time on a device."""
    frames = max(1, CHUNK // max(1, video[0].numel()))
    for pair in zip(video.split(frames), other.split(frames), strict=True):
        yield pair[0].to(device), pair[1].to(device)


def psnr(video: Tensor, other: Tensor, device: torch.device) -> float:
    """As `wan.tools.quality.psnr` of two uint8 videos of one shape, in dB, at the most `MOST_DB`."""
    squares = sum(int((one.int() - two.int()).square().sum()) for one, two in _chunks(video, other, device))
    if squares == 0:
        return MOST_DB
    return min(MOST_DB, -10 * math.log10(squares / video.numel() / 255**2))


def ssim(video: Tensor, other: Tensor, device: torch.device) -> float:
    """As `wan.tools.quality.ssim` of two uint8 videos (frames, H, W, 3)."""
    return _mean_over_frames(quality.ssim, video, other, device)


def _mean_over_frames(
    measure: Callable[[Tensor, Tensor], float], video: Tensor, other: Tensor, device: torch.device
) -> float:
    """That of whole videos of a measure that is a mean over frames."""
    total = sum(measure(one, two) * len(one) for one, two in _chunks(video, other, device))
    return total / len(video)


class Lpips:
    """LPIPS (Zhang et al. 2018) on AlexNet's features, mean over frames; 0 for equal videos.

    how: by which package it is measured
    """

    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor], how: str, device: torch.device):
        self._distance, self.how, self.device = distance, how, device

    def __call__(self, video: Tensor, other: Tensor) -> float:
        return _mean_over_frames(self._of, video, other, self.device)

    @torch.no_grad()
    def _of(self, video: Tensor, other: Tensor) -> float:
        # Of uint8 frames, numbers in [-1, 1] with channels first.
        one, two = (frames.permute(0, 3, 1, 2).float() / 127.5 - 1 for frames in (video, other))
        return float(self._distance(one, two).mean())


class Unavailable(Exception):
    """A measure that cannot be had here, and why."""


def load_lpips(device: torch.device) -> Lpips:
    """By `lpips` or else `torchmetrics`; raises `Unavailable` if neither is installed, or has its weights."""
    reasons = []
    for package, load in (("lpips", _by_lpips), ("torchmetrics", _by_torchmetrics)):
        if not _is_installed(package):
            reasons.append(f"{package} is not installed")
            continue
        try:
            version = installed_versions([package]).get(package, "")
            return Lpips(load(device), f"{package} {version}".strip() + f", {LPIPS_NET}", device)
        # Missing packages, downloads that fail in any way, and files that are damaged.
        except Exception as error:
            reasons.append(f"{package}: {in_a_line(error)}")
    raise Unavailable(f"{'; '.join(reasons)}; pip install lpips, and have AlexNet's weights where torchvision looks")


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    # A module without a specification, as one that was made by hand.
    except ValueError:
        return True


def _by_lpips(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    model: Any = importlib.import_module("lpips").LPIPS(net=LPIPS_NET, verbose=False)
    return model.eval().to(device)


def _by_torchmetrics(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    module: Any = importlib.import_module("torchmetrics.image.lpip")
    model = module.LearnedPerceptualImagePatchSimilarity(net_type=LPIPS_NET, reduction="mean")
    # Its forward keeps sums of what it was given, which grow without use.
    model = model.eval().to(device)

    def distance(one: Tensor, other: Tensor) -> Tensor:
        found = model(one, other)
        model.reset()
        return found

    return distance


def in_a_line(error: Exception) -> str:
    """What a library's error says, short, to go on after."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
