"""Under torchrun: the latents of checkpoints in every layout against one process's, a JSON line a case.

With two processes also those of diffusers' pipeline, and on a CPU those of compiled blocks, those with step caches, and
outputs under diffusers' own context parallelism: in the same run, since each start takes long.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import cached
import torch
from diffusers_parallel import error_of_pipeline, errors
from torch._inductor.utils import run_and_get_code

from nabla import NablaConfig
from wan import Checkpoint, WanT2V, apply_attention
from wan.parallel.distributed import DistributedContext
from wan.parallel.layout import ParallelLayout

SIZES = {"full tiles": (3, 16, 16), "partial tiles": (2, 18, 22)}
CONFIGS = {
    "dense": NablaConfig(),
    "nabla": NablaConfig(threshold=0.4),
    "nabla and window, a step and a layer dense": NablaConfig(
        threshold=0.5, window=(3, 1, 1), dense_steps=1, dense_layers=(1,)
    ),
    "masks kept": NablaConfig(threshold=0.4, mask_refresh=2),
}
LAYOUTS = {2: (ParallelLayout(cfg=2), ParallelLayout(ulysses=2)), 4: (ParallelLayout(cfg=2, ulysses=2),)}


def main(device: str, checkpoints: list[Path]) -> None:
    with DistributedContext.join(device) as distributed:
        for checkpoint in checkpoints:
            heads = Checkpoint.open(checkpoint).heads
            for case in cases(distributed.world_size, heads, compiles=device == "cuda"):
                say(
                    distributed,
                    heads=heads,
                    layout=asdict(case[0]),
                    sharded=case[1],
                    case=case[2:],
                    **compare(distributed, checkpoint, *case),
                )
        if distributed.world_size == 2 and device == "cpu":
            case = ParallelLayout(ulysses=2), False, "nabla", "partial tiles"
            compiled = functools.partial(compare, distributed, checkpoints[0], *case, compiles=True)
            result, codes = run_and_get_code(compiled)
            say(distributed, what="compiled", orders=list(map(order_of, codes)), **result)
            for result in cached.cases(distributed, checkpoints[0]):
                say(distributed, what="cached", **result)
            for error in errors(distributed):
                say(distributed, what="diffusers", error=error)
        # diffusers' own parallelism divides heads evenly.
        if distributed.world_size == 2 and Checkpoint.open(checkpoints[0]).heads % 2 == 0:
            say(distributed, what="pipeline of diffusers", error=error_of_pipeline(distributed, checkpoints[0]))


def compare(
    distributed: DistributedContext,
    checkpoint: Path,
    layout: ParallelLayout,
    sharded: bool,
    attention: str,
    size: str,
    compiles: bool | None = None,
) -> dict[str, float]:
    """On the first process, the error of latents, and the share of the transformer's parameters that it holds."""
    pipe = load(distributed, checkpoint, layout, sharded, compiles)
    apply_attention(pipe.transformer, CONFIGS[attention])
    latents = sample(pipe, SIZES[size])
    if distributed.rank > 0:
        return {}
    exact, whole = alone(checkpoint, attention, size, distributed.device)
    error = (latents - exact).norm() / exact.norm()
    return {"error": error.item(), "held": own_bytes(pipe.transformer) / whole}


# Cases of one form follow each other.
@functools.lru_cache(maxsize=1)
def load(
    distributed: DistributedContext, checkpoint: Path, layout: ParallelLayout, sharded: bool, compiles: bool | None
) -> WanT2V:
    distributed.init_meshes(layout)
    form = {"dit_fsdp": sharded, "t5_fsdp": sharded, "compile": compiles}
    return WanT2V.from_pretrained(checkpoint, CONFIGS["nabla"], distributed.device, processes=distributed, **form)


def cases(count: int, heads: int, compiles: bool) -> Iterator[tuple[ParallelLayout, bool, str, str]]:
    """All, but few of them with sharded weights, with heads that do not divide, or where each takes a compile."""
    for layout, sharded in itertools.product(LAYOUTS[count], (False, True)):
        few = compiles or sharded or heads % 2 > 0
        for attention in ["nabla"] if compiles else list(CONFIGS)[: 2 if few else None]:
            if layout.cfg == 1 or CONFIGS[attention].mask_refresh == 1:
                for size in list(SIZES)[1 if few else 0 :]:
                    yield layout, sharded, attention, size


def order_of(code: str) -> str:
    """In which order a compiled block sends (s), waits (w) and attends (a)."""
    attention = {"gather": "a", "_scaled_dot_product_flash_attention_for_cpu": "a"}
    calls = {"all_to_all_single": "s", "wait_tensor": "w"} | attention
    return "".join(calls[name] for name in re.findall(rf"torch\.ops\.\w+\.({'|'.join(calls)})\.default\(", code))


@functools.cache
def alone(checkpoint: Path, attention: str, size: str, device: torch.device) -> tuple[torch.Tensor, int]:
    """The latents of one process, and what its parameters take."""
    pipe = WanT2V.from_pretrained(checkpoint, CONFIGS[attention], device)
    return sample(pipe, SIZES[size]), own_bytes(pipe.transformer)


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


def say(distributed: DistributedContext, **result: object) -> None:
    if distributed.rank == 0:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], [Path(name) for name in sys.argv[2:]])
