"""Under torchrun: latents of Wan's videos from pictures in every layout against one process's, a JSON line a case."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import picture_pipelines

from nabla import NablaConfig
from wan.attention.apply import apply_attention
from wan.models.wan.condition import Condition
from wan.models.wan.processor import TRANSFORMER
from wan.parallel.distributed import DistributedContext
from wan.parallel.layout import ParallelLayout
from wan.parallel.sequence_parallel import apply_sequence_parallel

SIZE, FRAMES, LATENTS = (80, 96), 9, (3, 12, 10)
CONFIG = NablaConfig(threshold=0.4, tile=(1, 4, 4))


def main() -> None:
    with DistributedContext.join("cpu") as processes:
        for layout in (ParallelLayout(ulysses=2), ParallelLayout(cfg=2)):
            processes.init_meshes(layout)
            for kind in picture_pipelines.KINDS:
                own, condition = sample(kind, processes)
                if processes.rank:
                    continue
                alone, exact = sample(kind, None)
                result = {"layout": asdict(layout), "kind": kind, "error": ((own - alone).norm() / alone.norm()).item()}
                # Also of the picture's states, where there are any.
                pairs = zip((condition.y, condition.clip), (exact.y, exact.clip))
                same = all(one is two is None or bool((one == two).all()) for one, two in pairs)
                print(json.dumps(result | {"same": same}), flush=True)


def sample(kind: str, processes: DistributedContext | None) -> tuple[picture_pipelines.Tensor, Condition]:
    """On all processes, or on this one alone: latents, and what they began with, which one process alone encoded."""
    pipe = picture_pipelines.pipeline(kind, processes=processes)
    for transformer in pipe.transformers if processes is not None and processes.layout.ulysses > 1 else ():
        apply_sequence_parallel(transformer, processes.ulysses_mesh, TRANSFORMER)
    apply_attention(pipe.transformers, CONFIG, TRANSFORMER)
    condition = pipe.condition(**picture_pipelines.given_to(kind), size=SIZE, frame_num=FRAMES)
    return picture_pipelines.sample(pipe, condition, LATENTS), condition


if __name__ == "__main__":
    main()
