"""Where each component of a run waits and runs, and how its weights are quantised: every run has such a plan.

It follows a plan of memory, or what was asked for and what the components weigh.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from wan.memory.options import LoadOptions
from wan.memory.placement import is_crowded
from wan.memory.planner import MemoryPlan
from wan.quantize.float8 import FLOAT8

log = logging.getLogger("wan")

CPU = torch.device("cpu")
# More blocks than any model has.
ALL_BLOCKS = sys.maxsize


@dataclass(frozen=True)
class Placement:
    """Of one component.

    waits, runs: the devices that it is on while it is idle, and while it works
    quantization: the key of that of its linear layers, and whether it was asked for by name
    kept: how many of its first blocks stay on the device while it works, and the others are streamed; None if it moves
        as a whole
    pinned: whether streamed weights wait in pinned host memory
    mesh: of the processes over which it is sharded, on their devices throughout
    """

    waits: torch.device
    runs: torch.device
    quantization: str | None = None
    asked: bool = False
    kept: int | None = None
    pinned: bool = False
    mesh: DeviceMesh | None = None

    @property
    def reads_to(self) -> torch.device:
        """Where its weights go as they are read."""
        # Torch moves a quantised tensor from the device that it names alone, which is the one that it runs on.
        moves_quantized = self.quantization is not None and self.kept is None
        return self.runs if moves_quantized or self.mesh is not None else self.waits


@dataclass(frozen=True)
class LoadPlan:
    """offload: whether components that are idle leave the GPU"""

    transformer: Placement
    text_encoder: Placement
    vae: Placement
    offload: bool


@dataclass(frozen=True)
class ComponentBytes:
    """What the components weigh in the run's type; transformer: all experts together; image_encoder: in its own."""

    transformer: int
    text_encoder: int
    vae: int
    image_encoder: int = 0


def make_load_plan(options: LoadOptions, fp8: bool, sizes: ComponentBytes) -> LoadPlan:
    """What a plan of memory says, if there is one, else what was asked for. fp8: is asked of the transformer"""
    return _planned(options.plan, options.device) if options.plan is not None else _asked(options, fp8, sizes)


def _planned(plan: MemoryPlan, device: torch.device) -> LoadPlan:
    home = CPU if plan.in_turns else device
    text_runs, text_waits = (CPU, CPU) if plan.text == "cpu" else (device, home)
    text_kept = None
    if plan.text == "stream":
        text_kept = 0
    elif plan.in_turns and plan.text != "cpu" and plan.text_quantization is not None:
        # Quantised tensors do not move as a whole, but as pieces of memory.
        text_kept = ALL_BLOCKS
    # Where all models stay on the GPU nothing moves, so that nothing is streamed either.
    kept = plan.kept if plan.in_turns else None
    return LoadPlan(
        transformer=Placement(home, device, plan.quantization, kept=kept, pinned=plan.pinned),
        text_encoder=Placement(text_waits, text_runs, plan.text_quantization, kept=text_kept, pinned=plan.pinned),
        vae=Placement(home, device),
        offload=plan.in_turns,
    )


def _asked(options: LoadOptions, fp8: bool, sizes: ComponentBytes) -> LoadPlan:
    offload = _offloads(options, sizes) if options.offload is None else options.offload
    home = CPU if offload else options.device
    text_runs, text_waits = (CPU, CPU) if options.t5_cpu else (options.device, home)
    mesh = None if options.distributed is None else options.distributed.video_mesh
    return LoadPlan(
        transformer=Placement(
            home,
            options.device,
            quantization=FLOAT8.key if fp8 else None,
            asked=fp8,
            mesh=mesh if options.dit_fsdp else None,
        ),
        text_encoder=Placement(text_waits, text_runs, mesh=mesh if options.t5_fsdp else None),
        vae=Placement(home, options.device),
        offload=offload,
    )


def _offloads(options: LoadOptions, sizes: ComponentBytes) -> bool:
    """Whether what this process holds of the components would crowd its GPU."""
    # Each process has a part of what is sharded, and only the leader the VAE and a whole text encoder.
    sharing = options.processes_per_video
    need = sizes.transformer // (sharing if options.dit_fsdp else 1)
    need += sizes.vae + sizes.image_encoder if options.is_leader else 0
    if (options.is_leader or options.t5_fsdp) and not options.t5_cpu:
        need += sizes.text_encoder // (sharing if options.t5_fsdp else 1)
    offload = is_crowded(options.device, need)
    if offload and sharing > 1 and not options.dit_fsdp:
        log.warning("warning: idle weights move to host memory, a copy for each process; --dit_fsdp shards them")
    return offload
