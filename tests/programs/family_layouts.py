"""Under torchrun: latents of every kind of Wan in every layout against one process's, a JSON line a case.

Of the sets' checkpoints, on a grid that neither tiles nor processes divide, with block-sparse attention: all in one
run, since each start takes long.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parents[1]))

import torch
from picture_pipelines import picture
from torch import Tensor, nn
from vace_pipelines import drawn
from wan_family_sets import KIND_OF, TWO_EXPERTS, checkpoint

import wan
from nabla import NablaConfig
from wan.caches.applied import reuse_of
from wan.caches.apply import apply_cache, remove_cache
from wan.config.cache_settings import CacheSettings
from wan.models.attention import spec_of
from wan.models.wan.condition import Condition
from wan.models.wan.processor import blocks_of
from wan.parallel.distributed import DistributedContext
from wan.parallel.layout import ParallelLayout
from wan.parallel.sequence_parallel import sequence_parallel_of

LAYOUTS = {
    2: (ParallelLayout(ulysses=2), ParallelLayout(cfg=2), ParallelLayout(replicas=2)),
    4: (ParallelLayout(cfg=2, ulysses=2),),
}
REPLICATED = ("wan22_i2v",)
SPARSE = NablaConfig(threshold=0.4, tile=(1, 4, 4), dense_steps=1)
# Of tokens (3, 6, 5).
FRAMES, GRID = 9, (3, 12, 10)
# Two are either expert's.
STEPS = 4
CACHES = {
    "taylorseer": CacheSettings("taylorseer", interval=2, warmup=0),
    "first_block": CacheSettings("first_block", 1e6, warmup=0, max_skips=1),
}
GIVEN: dict[str, dict[str, Any]] = {
    "i2v": {"image": picture()},
    "flf2v": {"image": picture(), "last_image": picture(40, 30, seed=1)},
    "wan22_i2v": {"image": picture()},
    "ti2v_5b": {"image": picture()},
    "vace": {
        "src_video": drawn(11, 110, 90, 3),
        "src_mask": drawn(11, 110, 90, 3, seed=1),
        "src_ref_images": [drawn(50, 70, 3, seed=2)],
    },
}


class Case(NamedTuple):
    """scales: of guidance; cache: of `CACHES`; refresh: for how many steps blocks are kept; given: more than text"""

    task: str
    given: bool
    scales: float | tuple[float, float] = 3.0
    cache: str | None = None
    refresh: int = 1


class Sampled(NamedTuple):
    """condition: what the latents began with; reused: how many forwards a cache made of earlier ones"""

    latents: Tensor
    condition: Condition | None
    reused: int | None


def main() -> None:
    with DistributedContext.join("cpu") as processes:
        for layout in LAYOUTS[processes.world_size]:
            processes.init_meshes(layout)
            for task in KIND_OF if layout.replicas == 1 else REPLICATED:
                for sharded in (False, True) if layout.ulysses > 1 else (False,):
                    compare_all(processes, task, sharded)


def compare_all(processes: DistributedContext, task: str, sharded: bool) -> None:
    """Of a video that processes share one says the results; of replicas each."""
    form = {"dit_fsdp": sharded, "t5_fsdp": sharded}
    pipe = wan.from_pretrained(checkpoint(task), SPARSE, processes=processes, **form)
    # Of those that share a video one alone reads what is given.
    assert (pipe.vae is not None) is processes.is_leader and (pipe.image_encoder is None or processes.is_leader)
    split = [sequence_parallel_of(one) is not None for one in pipe.transformers]
    assert split == [processes.layout.ulysses > 1] * len(pipe.transformers)
    ways = asdict(processes.layout)
    if sharded:
        states = encode(pipe)
        if processes.is_leader:
            say(case="text", task=task, layout=ways, error=error_of(states, encode(alone(task))))
    for case in cases(task, processes.layout, sharded):
        own = sample(pipe, case)
        if processes.is_leader:
            exact = sample_alone(case)
            result = {"error": error_of(own.latents, exact.latents), "same": is_same(own.condition, exact.condition)}
            result |= {"reused": own.reused, "reused_alone": exact.reused}
            held = own_numbers(pipe.transformers) / own_numbers(alone(task).transformers)
            say(case=case._asdict(), task=task, layout=ways, sharded=sharded, held=held, **result)


def cases(task: str, layout: ParallelLayout, sharded: bool) -> Iterator[Case]:
    """Those of two experts also where one is not guided, with step caches over both and with blocks that are kept."""
    case = Case(task, task in GIVEN, (3.0, 4.0) if task in TWO_EXPERTS else 3.0)
    yield case
    if task == "ti2v_5b" and not sharded:
        yield case._replace(given=False)
    if task in TWO_EXPERTS and layout.replicas == 1:
        yield from (case._replace(scales=scales) for scales in ((3.0, 1.0), (1.0, 3.0)) if not sharded)
        yield from (case._replace(cache=cache) for cache in CACHES)
        if layout.cfg == 1 and not sharded:
            yield case._replace(refresh=3)
    if task == "vace" and not sharded:
        yield case._replace(cache="taylorseer")


@functools.cache
def alone(task: str) -> Any:
    return wan.from_pretrained(checkpoint(task), SPARSE)


@functools.cache
def sample_alone(case: Case) -> Sampled:
    return sample(alone(case.task), case)


def sample(pipe: Any, case: Case) -> Sampled:
    """Always of the same noise and texts."""
    wan.apply_attention(pipe.transformers, replace(SPARSE, mask_refresh=case.refresh))
    for one in pipe.transformers:
        remove_cache(one) if case.cache is None else apply_cache(one, CACHES[case.cache], spec_of(one))
    config, generator = pipe.transformer.config, torch.Generator().manual_seed(0)
    condition, stride = None, 16 if case.task == "ti2v_5b" else 8
    if case.given:
        condition = pipe.condition(**GIVEN[case.task], size=(GRID[2] * stride, GRID[1] * stride), frame_num=FRAMES)
    frames = GRID[0] + (1 if case.task == "vace" else 0)
    noise = torch.randn(1, config.out_channels, frames, *GRID[1:], generator=generator)
    texts = torch.randn(2, 7, config.text_dim, generator=generator).split(1)
    form = {"steps": STEPS, "shift": 5.0, "guide_scale": case.scales}
    latents = pipe.sample(*texts, noise=noise, conditions=condition, **form)
    return Sampled(latents, condition, None if case.cache is None else reuse_of(pipe.transformers)[1])


def encode(pipe: Any) -> Tensor:
    return pipe.encode_text(torch.tensor([[5, 9, 3, 1]]), torch.ones(1, 4, dtype=torch.long))


def error_of(own: Tensor, exact: Tensor) -> float:
    return ((own - exact).norm() / exact.norm()).item()


def is_same(own: Condition | None, exact: Condition | None) -> bool:
    """Also of the picture's states, where there are any."""
    if own is None or exact is None:
        return own is exact
    return all(one is two is None or torch.equal(one, two) for one, two in ((own.y, exact.y), (own.clip, exact.clip)))


def own_numbers(transformers: tuple[nn.Module, ...]) -> int:
    """How many numbers the parameters of all blocks are on this process."""
    parameters = [x for one in transformers for block in blocks_of(one) for x in block.parameters()]
    return sum(getattr(one, "_local_tensor", one).numel() for one in parameters)


def say(**result: Any) -> None:
    # One write, since replicas write to the same place.
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
