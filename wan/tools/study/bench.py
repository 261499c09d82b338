"""The pipeline of the study: a checkpoint whose attention is set as a `Setting` says."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nabla import NablaConfig, Plan
from wan import WanT2V, apply_attention
from wan.attention.apply import applied_attention
from wan.attention.plans import Plans
from wan.config.settings import changed
from wan.parallel.distributed import pick_device
from wan.shapes.accuracy import make_videos
from wan.shapes.sentences import of_shapes
from wan.tools.study.rules import RULES, Rule, RuleSelection
from wan.tools.study.settings import DENSE, Setting

# Videos of different seeds have noise of their own, however many sentences there are.
SEED_STEP = 100_000


class RulePlans:
    """Plans of others, with blocks that another rule chooses."""

    def __init__(self, plans: Plans, rule: Rule):
        self.plans, self.rule = plans, rule
        # By what they are made of, which `plans` holds.
        self.ruled: dict[int, Plan] = {}

    def of(self, *args: Any, **options: Any) -> Plan:
        plan = self.plans.of(*args, **options)
        if plan.selection is None:
            return plan
        if id(plan) not in self.ruled:
            selection = plan.selection
            parts = {one.name: getattr(selection, one.name) for one in fields(selection)}
            self.ruled[id(plan)] = replace(plan, selection=RuleSelection(**parts, rule=self.rule))
        return self.ruled[id(plan)]


class Bench:
    """A checkpoint, and those distilled from it, each opened when it is first asked for.

    distilled: folders of weights, by the share that they were distilled at
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = pick_device(args.device)
        self.distilled: dict[float, Path] = {}
        self.opened: dict[float | None, WanT2V] = {}

    @cached_property
    def shipped(self) -> WanT2V:
        return self.pipeline(None)

    def pipeline(self, weights: float | None) -> WanT2V:
        """The pipeline of the shipped weights (None), or of those distilled at a share."""
        if weights not in self.opened:
            folder = self.args.ckpt_dir if weights is None else self.distilled[weights]
            dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
            # Not compiled: each rule would be a graph of its own.
            pipe = WanT2V.from_pretrained(folder, NablaConfig(), self.device, dtype, compile=False)
            pipe.video = changed(pipe.video, size=self.args.size, frame_num=self.args.frame_num)
            pipe.sampling = changed(pipe.sampling, steps=self.args.steps)
            self.opened[weights] = pipe
        return self.opened[weights]

    def set_up(self, setting: Setting) -> WanT2V:
        """The pipeline of a setting, with its attention."""
        pipe = self.pipeline(setting.weights)
        apply_attention(pipe.transformers, setting.config(len(pipe.transformer.blocks)))
        if setting.rule in RULES and (build := RULES[setting.rule].build) is not None:
            applied = applied_attention(pipe.transformer)
            assert applied is not None
            applied.plans = cast(Plans, RulePlans(applied.plans, build()))
        return pipe

    def dense(self) -> WanT2V:
        """The shipped weights with dense attention."""
        return self.set_up(Setting(DENSE))

    def sentences(self, count: int) -> list[tuple[str, dict[str, str]]]:
        """Held-out sentences of the data set, and what they say of shapes."""
        return of_shapes(count, self.args.seed, "held_out")

    def videos(self, pipe: WanT2V, prompts: list[str], seeds: int) -> Iterator[Tensor]:
        """A uint8 video (frames, H, W, 3) a prompt and seed, all prompts of the first seed first."""
        for number in range(seeds):
            yield from make_videos(pipe, prompts, self.args.seed + SEED_STEP * number, self.args.batch)
