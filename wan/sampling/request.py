"""What is asked of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from wan.config.settings import SamplingSettings, VideoSettings


@dataclass(frozen=True)
class VideoRequest:
    """A video to make, the same for pipelines of all families."""

    prompt: str
    video: VideoSettings
    sampling: SamplingSettings
