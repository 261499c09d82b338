"""What is asked of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wan.config.settings import SamplingSettings, VideoSettings


@dataclass(frozen=True)
class VideoRequest:
    """A video to make, the same for pipelines of all families.

    image: (height, width, 3) uint8 RGB, which it begins with, as large as it came; None for text alone
    """

    prompt: str
    video: VideoSettings
    sampling: SamplingSettings
    image: np.ndarray | None = None
