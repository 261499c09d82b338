"""Pictures of a video that is still being made."""

from __future__ import annotations

import logging
import time

import numpy as np
import torch
from torch import Tensor

from wan.files.video import to_frames
from wan.sampling.guided import GuidedPipeline

log = logging.getLogger("wan")

# Of a video's time that its previews may take.
SHARE_OF_TIME = 0.01


class Preview:
    """The first frame of what each step predicts, as often as it costs little beside the steps."""

    def __init__(self, pipe: GuidedPipeline):
        self.pipe = pipe
        self.next_at = 0.0

    def see(self, clean: Tensor) -> np.ndarray | None:
        """(height, width, 3) uint8 of clean latents (B, C, T, h, w); None if it is not time yet."""
        if time.perf_counter() < self.next_at:
            return None
        pipe = self.pipe
        if pipe.device.type == "cuda":
            # What the GPU still has to do of the step is no time of a preview.
            torch.cuda.synchronize(pipe.device)
        start = time.perf_counter()
        try:
            # glimpse: (B, 3, height, width); of the first of the batch a video of one frame, (3, 1, height, width).
            picture = to_frames(pipe.glimpse(clean)[0, :, None])[0]
        except torch.OutOfMemoryError:
            log.warning("warning: there is no memory for a preview beside the transformer, so this video has none")
            self.next_at = float("inf")
            return None
        end = time.perf_counter()
        # After one that took t seconds the next comes t / share later, so that all take at most that share.
        self.next_at = end + (end - start) / SHARE_OF_TIME
        return picture
