"""What stands beside the noise of a video that begins with more than text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Condition(Tensor):
    """A tensor like any other, unbatched, (C, T, h, w) in float32, and with it what else guides the video.

    clip: states (pictures, tokens, width) of the picture tower, where the transformer sees them
    references: how many latent frames of reference pictures stand in front of the video's
    context_scale: what the tensor's part in the video is multiplied by
    """

    clip: Tensor | None
    references: int
    context_scale: float

    # What is computed of one is a tensor and no more.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def of(cls, y: Tensor, clip: Tensor | None = None, references: int = 0, context_scale: float = 1.0) -> Condition:
        """One of a tensor, with what goes with it."""
        made: Any = y.as_subclass(cls)
        made.clip, made.references, made.context_scale = clip, references, context_scale
        return made

    @property
    def y(self) -> Tensor:
        """The tensor alone."""
        return self.as_subclass(Tensor)
