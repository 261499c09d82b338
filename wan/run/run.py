"""One run of generate.py: what to make is settled, the processes that make it are laid out, and it is made."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch

from nabla import InputError
from nabla.checks import is_count
from wan.attention.compile import check_compiler
from wan.config.settings import Settings
from wan.memory.budget import check_memory
from wan.models.checkpoint import Checkpoint
from wan.parallel.distributed import DistributedContext, pick_device, started_by_torchrun
from wan.parallel.layout import choose_layout
from wan.run.advice import say_what_runs
from wan.run.generation import generate_all
from wan.run.outputs import check_log_and_report, choose_videos
from wan.run.request import Options, Request
from wan.run.settle import settle

log = logging.getLogger("wan")


def run(request: Request, options: Options) -> None:
    """Make the video or videos of a request. Under torchrun all its processes come here, and work together."""
    if started_by_torchrun():
        with DistributedContext.join(options.device) as processes:
            # Warnings only, of the others, until each replica's leader speaks for itself.
            log.setLevel(logging.INFO if processes.rank == 0 else logging.WARNING)
            _run(request, options, processes.device, processes)
        return
    check_alone(options)
    _run(request, options, pick_device(options.device), None)


def check_alone(options: Options) -> None:
    """Raise `InputError` for options that take several processes, of a run that is one."""
    for name in ("replicas", "cfg_size", "ulysses_size"):
        asked = getattr(options, name)
        if asked is not None and (not is_count(asked) or asked == 0):
            raise InputError(f"{name} {asked!r} is not a positive integer; leave it out to have it chosen")
        if asked not in (None, 1):
            raise InputError(f"{name} {asked} needs several processes; start with torchrun")
    for name in ("dit_fsdp", "t5_fsdp"):
        if getattr(options, name):
            raise InputError(f"{name} True needs several processes; start with torchrun")


def _run(request: Request, options: Options, device: torch.device, processes: DistributedContext | None) -> None:
    check_memory(options.memory, device, processes, options.offload)
    # What needs no checkpoint comes first: loading may take minutes, and a download hours.
    if device.type == "cuda" if options.compile is None else options.compile:
        check_compiler(device)
    if processes is None or processes.rank == 0:
        check_log_and_report(options, {request.save_file.absolute()} if request.save_file else set())
    checkpoint, videos = settle(request, device)
    if (options.replicas or 1) > len(videos):
        raise InputError(f"replicas {options.replicas} are more than the prompts, {len(videos)}; lower it")
    if processes is None or processes.rank == 0:
        say_what_runs(checkpoint, videos, request)
        videos = choose_videos(videos, request, options)
    if processes is not None:
        # One process decides for all what is left to make, and draws the seeds. All or none go on: work is shared
        # below.
        videos = processes.broadcast_object(videos)
    if not videos:
        return
    if processes is not None:
        lay_out(processes, checkpoint, [settings for settings, _ in videos], options)
    options = replace(options, named_apart=request.prompt_file is not None, again=request.config)
    generate_all(checkpoint, videos, device, options, processes)


def lay_out(processes: DistributedContext, checkpoint: Checkpoint, every: list[Settings], options: Options) -> None:
    """Choose how the processes share the work of videos, and have them know their places."""
    layout = choose_layout(
        processes.world_size,
        # A process needs a head and a token of its own, of every video.
        min(checkpoint.heads, *(math.prod(one.video.token_grid) for one in every)),
        # Branches that share masks have to take turns.
        guided=all(one.sampling.guided and one.attention.mask_refresh == 1 for one in every),
        prompts=len(every),
        sharded=options.dit_fsdp or options.t5_fsdp,
        replicas=options.replicas,
        cfg=options.cfg_size,
        ulysses=options.ulysses_size,
    )
    log.info("layout: %s", layout.describe())
    processes.init_meshes(layout)
