"""Under torchrun: VACE's latents, and those of a video whose tokens have timesteps of their own, in every
layout against one process's, a JSON line a case; VACE's also with sharded weights and with a step cache.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import picture_pipelines
import torch
import vace_pipelines

from nabla import NablaConfig
from wan.attention.apply import apply_attention
from wan.caches.apply import apply_cache
from wan.config.cache_settings import CacheSettings
from wan.models.wan.processor import TRANSFORMER, VACE_TRANSFORMER, blocks_of
from wan.parallel.distributed import DistributedContext
from wan.parallel.fsdp import apply_fsdp
from wan.parallel.layout import ParallelLayout
from wan.parallel.sequence_parallel import apply_sequence_parallel

LAYOUTS = {2: (ParallelLayout(ulysses=2), ParallelLayout(cfg=2)), 4: (ParallelLayout(cfg=2, ulysses=2),)}
CONFIGS = {"dense": NablaConfig(), "sparse": NablaConfig(threshold=0.4, tile=(1, 4, 4), dense_steps=1)}
CACHE = CacheSettings("taylorseer", interval=2, warmup=0.4)
# Of two processes one has no tokens of the given frame, which is a third of them.
SIZE, FRAMES, LATENTS = (80, 96), 9, (3, 12, 10)


def main() -> None:
    with DistributedContext.join("cpu") as processes:
        for layout in LAYOUTS[processes.world_size]:
            processes.init_meshes(layout)
            for case in cases():
                own, held = sample(*case, processes)
                if processes.rank:
                    continue
                alone, _ = sample(*case, None)
                error = ((own - alone).norm() / alone.norm()).item()
                print(json.dumps({"layout": asdict(layout), "case": case, "error": error, "held": held}), flush=True)


def cases() -> list[tuple[str, str, str]]:
    attentions = [("vace", attention, "") for attention in CONFIGS] + [("ti2v-5B", name, "") for name in CONFIGS]
    return [*attentions, ("vace", "sparse", "sharded"), ("vace", "sparse", "cached")]


def sample(kind: str, attention: str, form: str, processes: DistributedContext | None) -> tuple[torch.Tensor, float]:
    """On all processes, or on this one alone: latents, and the share of the blocks' parameters that it holds."""
    spec = VACE_TRANSFORMER if kind == "vace" else TRANSFORMER
    pipe: Any = (vace_pipelines if kind == "vace" else picture_pipelines).pipeline(
        **({} if kind == "vace" else {"kind": kind}), processes=processes
    )
    blocks, whole = blocks_of(pipe.transformer), own_numbers(pipe.transformer)
    if form == "sharded" and processes is not None:
        apply_fsdp(pipe.transformer, blocks, processes.video_mesh)
    if form == "cached":
        apply_cache(pipe.transformer, CACHE, spec)
    if processes is not None and processes.layout.ulysses > 1:
        apply_sequence_parallel(pipe.transformer, processes.ulysses_mesh, spec)
    apply_attention([pipe.transformer], CONFIGS[attention], spec)
    if kind == "vace":
        given = vace_pipelines.given()
        condition = pipe.condition(**given, size=vace_pipelines.SIZE, frame_num=vace_pipelines.FRAMES)
        latents = vace_pipelines.sample(pipe, condition)
    else:
        condition = pipe.condition(**picture_pipelines.given_to(kind), size=SIZE, frame_num=FRAMES)
        latents = picture_pipelines.sample(pipe, condition, LATENTS)
    return latents, own_numbers(pipe.transformer) / whole


def own_numbers(model: torch.nn.Module) -> int:
    """How many numbers the parameters of both lists of blocks are on this process."""
    parameters = [one for block in blocks_of(model) for one in block.parameters()]
    return sum(getattr(one, "_local_tensor", one).numel() for one in parameters)


if __name__ == "__main__":
    main()
