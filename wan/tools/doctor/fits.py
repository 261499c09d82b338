"""What fits into the memory that is free, by the plans that `--memory` makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nabla import InputError
from wan.config.settings import VideoSettings
from wan.memory.estimates import GIB
from wan.memory.placement import crowds
from wan.memory.planner import MemoryBudget, MemoryPlan, choose
from wan.models.wan.random_checkpoint import MODELS, weigh_models, workload_for

SIZES = (1280, 720), (832, 480)
NAMES = {"t2v-14B": "14B", "t2v-1.3B": "1.3B"}
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class MemoryFit:
    """A video of 81 frames: how it would be made.

    plan: None if it does not fit, and then why
    crowded: whether a run without a plan would move idle models to host memory
    """

    model: str
    size: tuple[int, int]
    plan: MemoryPlan | None
    refusal: str = ""
    crowded: bool = False

    @property
    def gib(self) -> float:
        """Expected at the most on the GPU."""
        return self.plan.peak / GIB

    @property
    def is_plain(self) -> bool:
        """Whether it needs no plan: all models stay on the GPU, as they are."""
        if self.plan is None or self.crowded:
            return False
        # Neither in turns nor quantised: what a run without --memory does.
        return not self.plan.in_turns and self.plan.quantization is self.plan.text_quantization is None


def memory_fits(budget: MemoryBudget, gib: float, can_quantize: bool) -> tuple[MemoryFit, ...]:
    """The plans of each model and size on a GPU, in bfloat16 unless another precision is part of them.

    gib: of the GPU, used memory included; can_quantize: whether torchao is there
    """
    total = int(gib * GIB)
    return tuple(_fit(model, VideoSettings(size), budget, total, can_quantize) for model in NAMES for size in SIZES)


def _fit(model: str, video: VideoSettings, budget: MemoryBudget, total: int, can_quantize: bool) -> MemoryFit:
    sizes = MODELS[model]
    transformer, text, vae_bytes = weigh_models(sizes, DTYPE)
    try:
        plan = choose(
            transformer, text, vae_bytes, workload_for(sizes, video, DTYPE), budget, can_quantize=can_quantize
        )
    except InputError as error:
        return MemoryFit(NAMES[model], video.size, None, str(error))
    # A run without a plan reckons with the VAE in the dtype of the others.
    unplanned = transformer.bytes(None) + text.bytes(None) + vae_bytes * DTYPE.itemsize // torch.float32.itemsize
    return MemoryFit(NAMES[model], video.size, plan, crowded=crowds(unplanned, total))
