"""What is asked of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wan.config.settings import SamplingSettings, VideoSettings
from wan.files.source_video import SourceVideo


@dataclass(frozen=True)
class VideoRequest:
    """A video to make, the same for pipelines of all families.

    image, last_image: (height, width, 3) uint8 RGB, which it begins and ends with, as large as they came; None for text
        alone
    src_video, src_mask: a video to keep parts of, and where to make others; see the pipelines that take them
    src_ref_images: pictures of what the video is to show
    """

    prompt: str
    video: VideoSettings
    sampling: SamplingSettings
    image: np.ndarray | None = None
    last_image: np.ndarray | None = None
    src_video: SourceVideo | None = None
    src_mask: SourceVideo | None = None
    src_ref_images: tuple[np.ndarray, ...] = ()
