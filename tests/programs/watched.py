"""Under torchrun with two processes: the shares that a recorder has of all heads, against one process's; a JSON line a
layout with the greatest difference."""

from __future__ import annotations

import json
import sys
from itertools import product

import numpy as np
import torch

from nabla import KeepProfile, NablaConfig, Stretch
from wan import Recorder, WanT2V
from wan.config.cache_settings import CacheSettings
from wan.observe import events
from wan.observe.step_trace import MaskExample
from wan.parallel.distributed import DistributedContext
from wan.parallel.layout import ParallelLayout

CONFIG = NablaConfig(threshold=0.4, window=(1, 1, 1), dense_steps=1, dense_layers=(1,))
# Of three steps: layers that run dense before they are sparse, and after.
BY_PROFILE = NablaConfig(profile=KeepProfile((Stretch(0.5, (1.0, 0.3)), Stretch(1.0, (0.3, 1.0)))))
# After two steps of three, whatever changed.
REUSES = CacheSettings("first_block", 1e9, warmup=0.6)


class Keeping(Recorder):
    """Keeps the shares of all heads of each step, and those of its first forward."""

    def __init__(self) -> None:
        super().__init__(examples=True)
        self.shares: list[np.ndarray] = []
        self.first: list[np.ndarray] = []

    def step_ends(self, step: int, latents: torch.Tensor) -> None:
        super().step_ends(step, latents)
        trace = self.profiler.trace
        self.shares.append(events.head_densities(trace))
        self.first.append((trace.densities[0] if trace.host_densities is None else trace.host_densities[0]).numpy())


def main(checkpoint: str) -> None:
    layouts = ParallelLayout(cfg=2), ParallelLayout(ulysses=2)
    with DistributedContext.join("cpu") as distributed:
        runs = [*product((CONFIG,), (None, REUSES), layouts), *product((BY_PROFILE,), (None,), layouts)]
        for config, cache, layout in runs:
            alone = sampled(WanT2V.from_pretrained(checkpoint, config, cache=cache))
            distributed.init_meshes(layout)
            recorder = sampled(WanT2V.from_pretrained(checkpoint, config, cache=cache, processes=distributed))
            if distributed.rank == 0:
                # Those of layers that did not run are nan.
                shares = [np.nan_to_num(np.stack(one.shares), nan=-1) for one in (recorder, alone)]
                differs = np.abs(shares[0] - shares[1]).max()
                heads = [[one.head, one.density - share_of(alone, one)] for one in recorder.examples]
                layers = [record for record in recorder.records if record["kind"] == "layer"]
                print(json.dumps({"differs": differs, "examples": heads, "layers": len(layers)}), flush=True)


def share_of(recorder: Keeping, example: MaskExample) -> float:
    """What one process said of the same head, of the branch that the leader of two runs."""
    return float(recorder.first[example.step][example.layer, example.head])


def sampled(pipe: WanT2V) -> Keeping:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 16, 2, 18, 22, generator=generator)
    texts = torch.randn(2, 7, pipe.transformer.config.text_dim, generator=generator).split(1)
    recorder = Keeping()
    pipe.sample(*texts, noise=noise, steps=3, observer=recorder)
    return recorder


if __name__ == "__main__":
    main(sys.argv[1])
