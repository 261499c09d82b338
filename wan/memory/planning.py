"""The plan of a run's memory, from what a family says that its models and videos take."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from wan.config.settings import Settings
from wan.memory.budget import budget_of, limit
from wan.memory.estimates import Weights, Workload, decode_bytes
from wan.memory.planner import MemoryPlan, choose

log = logging.getLogger("wan")


class Weighed(NamedTuple):
    """What a family says of a run before any weight is read.

    transformer: or each of as many `experts`, if they differ the larger one
    vae: bytes of it as it is read; workloads: one for each of the videos
    quantization: the key of the transformer's that is asked for, or that its file has done
    picture: bytes of the encoder of pictures, where there is one
    """

    transformer: Weights
    text: Weights
    vae: int
    workloads: Sequence[Workload]
    quantization: str | None
    experts: int = 1
    picture: int = 0


def _largest(workloads: Sequence[Workload]) -> Workload:
    """What stands for all of them: one plan serves them, since weights are loaded once."""
    largest = max(workloads, key=lambda workload: (workload.tokens, math.prod(workload.decoding.size)))
    given = max(workloads, key=lambda one: one.given + (decode_bytes(one.encoding) if one.encoding else 0))
    # Any of the videos may be the one that keeps masks, or what a cache reuses.
    most = {name: max(getattr(one, name) for one in workloads) for name in ("writing", "mask_layers", "cached")}
    return replace(largest, **most, encoding=given.encoding, given=given.given)


def plan_run(
    weighed: Weighed, settings: Settings, device: torch.device, memory: str | float, t5_cpu: bool = False
) -> MemoryPlan:
    """The plan for videos of one checkpoint, said in a line, and torch's memory on the device limited to what it has.

    settings: of one of the videos, which all have the same models
    Raises `InputError` if they cannot fit, before any weight is read.
    """
    budget, has_torchao = budget_of(device, memory), importlib.util.find_spec("torchao") is not None
    plan = choose(
        weighed.transformer,
        weighed.text,
        weighed.vae,
        _largest(weighed.workloads),
        budget,
        weighed.quantization,
        can_quantize=settings.dtype == "bfloat16" and has_torchao,
        text_cpu=t5_cpu,
        experts=weighed.experts,
        picture_bytes=weighed.picture,
    )
    log.info("memory: %s", plan.describe(budget, settings.dtype or "float32"))
    if not has_torchao:
        log.info("memory: weights in int8 and int4 need torchao, which is not installed, so they were left out")
    limit(device, budget)
    return plan
