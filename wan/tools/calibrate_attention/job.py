"""From a program's flags to what is measured: a checkpoint, videos, an attention, and a design."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nabla import InputError, NablaConfig
from wan.config.attention_settings import untuned_pool
from wan.config.settings import Settings
from wan.files.hashes import text_hash
from wan.files.json_files import to_line
from wan.memory.budget import check_memory
from wan.models.checkpoint import Checkpoint
from wan.parallel.distributed import pick_device
from wan.run.flags import SMALL_CHECKPOINT, flag_settings, options_of
from wan.run.generation import load_pipeline
from wan.run.ratios import conditions
from wan.run.request import Options, Request
from wan.run.settle import settle
from wan.run.versions import installed_versions
from wan.tools.calibrate_attention.bench import Bench
from wan.tools.calibrate_attention.design import Design
from wan.tools.calibrate_attention.seats import at_share
from wan.tools.calibrate_attention.stretches import spans_of, walk_of


@dataclass(frozen=True)
class Job:
    """every: settings of the prompts' videos, alike but for prompts and seeds, with the attention that is measured
    dense_steps: how many first steps of a run stay dense
    """

    checkpoint: Checkpoint
    every: tuple[Settings, ...]
    design: Design
    dense_steps: int
    device: torch.device
    options: Options
    mode: str

    @property
    def first(self) -> Settings:
        return self.every[0]

    def open_bench(self) -> Bench:
        """Load the models."""
        return Bench(
            load_pipeline(self.checkpoint, list(self.every), self.device, self.options), self.every, self.design
        )

    @property
    def measured_on(self) -> dict[str, Any]:
        """What a profile holds for, as plain values."""
        video, design = self.first.video, self.design
        on = conditions(self.first)
        # Whose place the profile takes.
        del on["attention"]
        return on | {
            "size": list(video.size),
            "frame_num": video.frame_num,
            "grid": list(video.token_grid),
            "prompts": design.prompts,
            "seeds": [one.sampling.seed for one in self.every[: design.prompts]],
            "walk_steps": design.walk.steps,
            "dtype": self.first.dtype,
            "card": _name_of(self.device),
            **installed_versions(["torch"]),
        }

    @property
    def settings(self) -> dict[str, Any]:
        """All that measurements depend on, as JSON has it."""
        design, attention = self.design, self.first.attention
        return self.measured_on | {
            "videos": [_hash(one) for one in self.every],
            "stretches": [[one.begin, one.end, one.expert] for one in design.spans],
            "shares": list(design.shares),
            "checked": design.checked,
            "attention": repr(at_share(attention, 1.0)),
            "mode": self.mode,
        }


def open_job(args: argparse.Namespace) -> Job:
    """What flags ask for; no model is loaded. Raises `InputError` for what cannot be."""
    device, options = pick_device(args.device), options_of(args)
    check_memory(options.memory, device, None, options.offload)
    # A cache would leave out forwards that are to be measured.
    flags = flag_settings(args) | {"cache": "none"}
    request = Request(flags, args.config, None, SMALL_CHECKPOINT, prompt_file=args.prompt_file)
    checkpoint, videos = settle(request, device)
    own = videos[0][0].attention
    measured = measured_attention(own, args.pool, args.window, args.shares[0])
    every = tuple(_prepared(one, args.seed + number, measured) for number, (one, _) in enumerate(videos))
    _check_alike(every)
    # Those of a profile are what is measured anew.
    dense = 0 if own.profile is not None else own.dense_step_count(every[0].sampling.steps)
    design = _design(args, checkpoint, every, dense)
    return Job(checkpoint, every, design, dense, device, options, args.mode)


def measured_attention(
    own: NablaConfig, pool: tuple[int, int, int] | None, window: tuple[int, int, int] | None, share: float
) -> NablaConfig:
    """The attention of settings at a share, with another pool or window where one is given.

    Weights that no choice of blocks is set for were not tuned for one, and have the parts of tiles that are best then.
    """
    own = at_share(own, share) if own.selects else _untuned(own, share)
    given: dict[str, Any] = {name: value for name, value in (("pool", pool), ("window", window)) if value is not None}
    return replace(own, **given)


def _untuned(own: NablaConfig, share: float) -> NablaConfig:
    parts: Any = untuned_pool(own.tile)
    return replace(at_share(own, share), pool=parts)


def _prepared(settings: Settings, seed: int, attention: NablaConfig) -> Settings:
    """With a seed of its own, which the files name, so that the same can be measured again."""
    given = settings.sampling.seed
    sampling = replace(settings.sampling, seed=seed if given in (None, -1) else given)
    return replace(settings, sampling=sampling, model=replace(settings.model, attention=attention))


def _check_alike(every: Sequence[Settings]) -> None:
    first = every[0]
    for one in every:
        if one.video != first.video:
            sizes = (f"{'x'.join(map(str, each.video.size))}x{each.video.frame_num}" for each in (first, one))
            raise InputError(f"videos of {' and '.join(sizes)}: a profile is for one size; give all prompts the same")


def _design(args: argparse.Namespace, checkpoint: Checkpoint, every: Sequence[Settings], dense: int) -> Design:
    sampling, boundary = every[0].sampling, checkpoint.layout.boundary
    checked = int(len(every) > 1) if args.check is None else args.check
    if not 0 <= checked < len(every):
        raise InputError(f"check {checked} leaves none of {len(every)} prompts to measure; give 0 to {len(every) - 1}")
    spans = spans_of(sampling, boundary, dense, args.stretches)
    walk = walk_of(sampling, boundary, spans, args.walk_steps)
    return Design(len(every) - checked, checked, tuple(spans), walk, args.shares)


def _hash(settings: Settings) -> str:
    shown = settings.to_dict()
    return text_hash(to_line({name: shown.get(name) for name in ("prompt", "sampling", "video", *settings.inputs)}))[
        :16
    ]


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"
