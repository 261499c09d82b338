"""What fits into the memory that is free, by the plans that `--memory` makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from nabla import InputError
from wan.config.settings import VideoSettings
from wan.memory.estimates import GIB
from wan.memory.placement import crowds
from wan.memory.planner import MemoryBudget, MemoryPlan, choose
from wan.models.kandinsky import random_checkpoint as kandinsky
from wan.models.kandinsky.random_sizes import workload_for as kandinsky_workload
from wan.models.wan import random_sizes as wan
from wan.models.wan.geometry import GEOMETRY_5B

DTYPE = torch.bfloat16


class Offered(NamedTuple):
    """A model of a family and videos that it is used for.

    weigh: as `choose` takes weights, of sizes and a dtype; workload: of sizes, a video and a dtype
    others: what else `choose` takes of sizes, by name
    """

    name: str
    sizes: Any
    weigh: Callable[..., Any]
    workload: Callable[..., Any]
    videos: tuple[VideoSettings, ...]
    others: Callable[[Any], dict[str, int]] = lambda sizes: {}


def _offered() -> tuple[Offered, ...]:
    large, small = (VideoSettings(size) for size in ((1280, 720), (832, 480)))
    five, ten = 121, 241
    of_5b = VideoSettings((1280, 704), five, geometry=GEOMETRY_5B)
    of_lite = tuple(VideoSettings((768, 512), frames) for frames in (five, ten))
    of_pro = tuple(VideoSettings(size, five) for size in ((1280, 768), (768, 512)))
    of_wan = (
        ("14B", "t2v-14B", (large, small)),
        ("1.3B", "t2v-1.3B", (large, small)),
        ("I2V 14B", "i2v-14B", (large, small)),
        ("VACE 14B", "vace-14B", (large, small)),
        ("VACE 1.3B", "vace-1.3B", (small,)),
        ("T2V-A14B", "t2v-A14B", (large, small)),
        ("I2V-A14B", "i2v-A14B", (large, small)),
        ("TI2V-5B", "ti2v-5B", (of_5b,)),
    )
    weights = wan.weigh_models, wan.workload_for
    other_weights = kandinsky.weigh_models, kandinsky_workload
    return (
        *(Offered(name, wan.MODELS[model], *weights, videos, wan.others_of) for name, model, videos in of_wan),
        Offered("Kandinsky-5 Lite", kandinsky.MODELS["kandinsky5-lite"], *other_weights, of_lite),
        Offered("Kandinsky-5 Pro", kandinsky.MODELS["kandinsky5-pro"], *other_weights, of_pro),
    )


@dataclass(frozen=True)
class MemoryFit:
    """How a video would be made.

    plan: None if it does not fit, and then why
    crowded: whether a run without a plan would move idle models to host memory
    """

    model: str
    size: tuple[int, int]
    plan: MemoryPlan | None
    refusal: str = ""
    crowded: bool = False
    frames: int = 81

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
    """The plans of each model and video on a GPU, in bfloat16 unless another precision is part of them.

    gib: of the GPU, used memory included; can_quantize: whether torchao is there
    """
    total = int(gib * GIB)
    return tuple(_fit(model, video, budget, total, can_quantize) for model in _offered() for video in model.videos)


def _fit(model: Offered, video: VideoSettings, budget: MemoryBudget, total: int, can_quantize: bool) -> MemoryFit:
    transformer, text, vae_bytes = model.weigh(model.sizes, DTYPE)
    workload, others = model.workload(model.sizes, video, DTYPE), model.others(model.sizes)
    try:
        plan = choose(transformer, text, vae_bytes, workload, budget, can_quantize=can_quantize, **others)
    except InputError as error:
        return MemoryFit(model.name, video.size, None, str(error), frames=video.frame_num)
    # A run without a plan reckons with all components in the dtype of the transformer.
    in_float32 = vae_bytes + others.get("picture_bytes", 0)
    unplanned = transformer.bytes(None) * others.get("experts", 1) + text.bytes(None)
    unplanned += in_float32 * DTYPE.itemsize // torch.float32.itemsize
    crowded = crowds(unplanned, total)
    return MemoryFit(model.name, video.size, plan, crowded=crowded, frames=video.frame_num)
