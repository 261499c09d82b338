"""Under torchrun: a walk over two experts in every layout against one process's, a JSON line a case."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from torch import Tensor
from wan_family_sets import checkpoint, expected

import wan
from wan.parallel.distributed import DistributedContext
from wan.parallel.fsdp import is_sharded
from wan.parallel.layout import ParallelLayout

TASK, ALGORITHM = "wan22_t2v", "nabla-0.7"
# Also of an expert without guidance, whose steps have one branch alone.
SCALES = (3.0, 4.0), (3.0, 1.0)
CASES = (ParallelLayout(ulysses=2), False), (ParallelLayout(ulysses=2), True), (ParallelLayout(cfg=2), False)


def main() -> None:
    with DistributedContext.join("cpu") as processes:
        for layout, sharded in CASES:
            processes.init_meshes(layout)
            pipe = wan.from_pretrained(checkpoint(TASK), ALGORITHM, processes=processes, dit_fsdp=sharded)
            assert all(is_sharded(one) is sharded for one in pipe.transformers)
            for scales in SCALES:
                own = sample(pipe, scales)
                if processes.rank:
                    continue
                alone = sample(wan.from_pretrained(checkpoint(TASK), ALGORITHM), scales)
                error = ((own - alone).norm() / alone.norm()).item()
                print(json.dumps({"layout": asdict(layout), "sharded": sharded, "error": error}), flush=True)


def sample(pipe: wan.WanT2V, scales: tuple[float, float]) -> Tensor:
    found = expected(TASK)
    texts = found["dit.context"][None], found["dit.negative"][None]
    return pipe.sample(*texts, noise=found["loop.noise"], steps=3, shift=12.0, guide_scale=scales)


if __name__ == "__main__":
    main()
