"""Under torchrun: the latents of every layout against one process's, a JSON line a case."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from nabla import NablaConfig
from wan import WanT2V
from wan.processes import Layout, Processes

SIZES = {"full tiles": (3, 16, 16), "partial tiles": (2, 18, 22)}
CONFIGS = {
    "dense": NablaConfig(),
    "nabla": NablaConfig(threshold=0.4),
    "nabla and window, a step and a layer dense": NablaConfig(
        threshold=0.5, window=(3, 1, 1), dense_steps=1, dense_layers=(1,)
    ),
    "masks kept": NablaConfig(threshold=0.4, mask_refresh=2),
}
LAYOUTS = {2: (Layout(cfg=2), Layout(ulysses=2)), 4: (Layout(cfg=2, ulysses=2),)}


def main(checkpoint: Path, heads: int, device: str) -> None:
    with Processes.together(device) as processes:
        for layout, sharded, attention, size in cases(processes.count, heads, compiles=device == "cuda"):
            processes.lay_out(layout)
            shards = {"dit_fsdp": sharded, "t5_fsdp": sharded}
            common = checkpoint, CONFIGS[attention], processes.device
            alone = WanT2V.from_pretrained(*common)
            shared = WanT2V.from_pretrained(*common, processes=processes, **shards)
            exact, latents = (sample(pipe, SIZES[size]) for pipe in (alone, shared))
            result = {
                "case": [asdict(layout), sharded, attention, size],
                "error": ((latents - exact).abs().max() / exact.abs().max()).item(),
                "held": own_bytes(shared.transformer) / own_bytes(alone.transformer),
            }
            if processes.rank == 0:
                print(json.dumps(result), flush=True)


def cases(count: int, heads: int, compiles: bool) -> Iterator[tuple[Layout, bool, str, str]]:
    """All, but few of them with sharded weights, with heads that do not divide, or where each takes a compile."""
    for layout, sharded in itertools.product(LAYOUTS[count], (False, True)):
        few = compiles or sharded or heads % layout.ulysses > 0
        for attention in ["nabla"] if compiles else list(CONFIGS)[: 2 if few else None]:
            if layout.cfg == 1 or CONFIGS[attention].mask_refresh == 1:
                for size in list(SIZES)[1 if few else 0 :]:
                    yield layout, sharded, attention, size


def own_bytes(model: torch.nn.Module) -> int:
    """What the parameters take on this process."""
    parameters = (getattr(one, "_local_tensor", one) for one in model.parameters())
    return sum(one.numel() * one.element_size() for one in parameters)


def sample(pipe: WanT2V, size: tuple[int, int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    own = pipe.transformer.config
    noise = torch.randn(1, own.in_channels, *size, generator=generator)
    texts = torch.randn(2, 7, own.text_dim, generator=generator).split(1)
    return pipe.sample(*texts, noise=noise, steps=3)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
