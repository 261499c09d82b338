"""How the models of a checkpoint are loaded: what a run is asked for, in one object that is passed on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wan.memory.planner import MemoryPlan
from wan.parallel.distributed import DistributedContext


@dataclass(frozen=True)
class LoadOptions:
    """What does not change the video, but where a plan of memory quantises weights.

    device: that the models run on
    offload: keep each component in host memory while it is idle; None decides by the size of the GPU
    t5_cpu: run the text encoder on the CPU
    compile: compile the transformer's blocks; None does so on a GPU. Every new size of video compiles anew
    distributed: the processes that share the work as they are laid out, or None for this one alone
    dit_fsdp, t5_fsdp: shard the transformer, the text encoder over the processes that share a video
    expand_prompt, expand_pictures: also load what the language model needs to write prompts, and to see pictures for it
    plan: where the models lie and how their weights are quantised, in place of offload, t5_cpu and a setting of fp8
    """

    device: torch.device
    offload: bool | None = None
    t5_cpu: bool = False
    compile: bool | None = None
    distributed: DistributedContext | None = None
    dit_fsdp: bool = False
    t5_fsdp: bool = False
    expand_prompt: bool = False
    expand_pictures: bool = False
    plan: MemoryPlan | None = None

    @property
    def compiles(self) -> bool:
        return self.device.type == "cuda" if self.compile is None else self.compile

    @property
    def is_leader(self) -> bool:
        """Whether this process has the VAE and a text encoder that is not sharded, of those that share a video."""
        return self.distributed is None or self.distributed.is_leader

    @property
    def processes_per_video(self) -> int:
        return 1 if self.distributed is None else self.distributed.layout.processes_per_video
