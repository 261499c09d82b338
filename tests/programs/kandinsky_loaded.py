"""Checkpoints of Kandinsky-5 loaded by several processes, sharded and not, against one process; see
kandinsky_layouts.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import cached
import torch
import torch.distributed as dist
from torch import Tensor

from nabla import NablaConfig
from wan.config.settings import VideoSettings
from wan.models.kandinsky.pipeline import Kandinsky5
from wan.parallel.distributed import DistributedContext
from wan.parallel.fsdp import is_sharded
from wan.parallel.layout import ParallelLayout
from wan.sampling.request import VideoRequest

ATTENTIONS = {"dense": NablaConfig(), "nabla": NablaConfig(threshold=0.4, window=(1, 1, 1), dense_steps=1)}
GUIDANCE, SEQUENCE, FOUR = ParallelLayout(cfg=2), ParallelLayout(ulysses=2), ParallelLayout(ulysses=4)
# By how many processes there are: layout, attention, dtype, and whether transformer and text encoder are sharded.
CASES = {
    2: [
        (GUIDANCE, "nabla", torch.float32, True, True),
        # Modulations are kept in float32, and branches run as they do alone.
        (GUIDANCE, "nabla", torch.bfloat16, True, False),
        (SEQUENCE, "nabla", torch.float32, False, True),
        (SEQUENCE, "dense", torch.float32, True, False),
    ],
    4: [(FOUR, "nabla", torch.float32, True, True)],
}
# A prompt of more rows than the transformer sees, and the negative one of a few.
PROMPT, NEGATIVE = "A red circle moves to the left. " * 40, "blurred"


def cases(processes: DistributedContext, checkpoint: Path) -> Iterator[dict[str, object]]:
    """On the first process the greatest errors of latents and conditions that any has, and the shares that they hold
    of the weights.
    """
    for layout, attention, dtype, *sharded in CASES[processes.world_size]:
        processes.init_meshes(layout)
        shards = dict(zip(("dit_fsdp", "t5_fsdp"), sharded))
        pipe = Kandinsky5.from_pretrained(
            checkpoint, ATTENTIONS[attention], "cpu", dtype, processes=processes, **shards
        )
        check_parts(pipe, *sharded)
        names = ["transformer"] * sharded[0] + ["text_encoder"] * sharded[1]
        every = gathered((sample(pipe), texts(pipe), [own_bytes(getattr(pipe, name)) for name in names]))
        if processes.rank > 0:
            yield {}
            continue
        alone = load_alone(checkpoint, attention, dtype)
        latents, guidance = sample(alone), texts(alone)
        whole = [own_bytes(getattr(alone, name)) for name in names]
        yield {
            "layout": asdict(layout),
            "attention": attention,
            "dtype": str(dtype),
            **shards,
            "error": max(relative_error(own, latents) for own, *_ in every),
            "text_error": max(relative_error(*pair) for _, own, _ in every for pair in zip(own, guidance, strict=True)),
            "held": [part / all_of_it for *_, held in every for part, all_of_it in zip(held, whole)],
        }


def cached_cases(processes: DistributedContext, checkpoint: Path) -> Iterator[dict[str, object]]:
    """What step caches do where processes share a sequence, as `cached.cases` says it."""
    processes.init_meshes(SEQUENCE)
    load = partial(Kandinsky5.from_pretrained, checkpoint, ATTENTIONS["nabla"])
    pipe = load(processes=processes)
    for settings in (cached.FIRST, cached.MAG, cached.TAYLORSEER):
        yield cached.compare(processes, pipe, load, settings, partial(sample, steps=cached.STEPS))


def check_parts(pipe: Kandinsky5, dit_fsdp: bool, t5_fsdp: bool) -> None:
    """What is sharded is on all processes, all else beside the transformer on the one that leads."""
    own = pipe.transformer
    for one in (own, *own.text_transformer_blocks, *own.visual_transformer_blocks):
        assert is_sharded(one) == dit_fsdp
    assert (pipe.text_encoder is not None) == (pipe.is_leader or t5_fsdp)
    assert pipe.text_encoder is None or is_sharded(pipe.text_encoder) == t5_fsdp
    for one in (pipe.vae, pipe.text_encoder_2):
        assert (one is not None) == pipe.is_leader


@functools.cache
def load_alone(checkpoint: Path, attention: str, dtype: torch.dtype) -> Kandinsky5:
    return Kandinsky5.from_pretrained(checkpoint, ATTENTIONS[attention], "cpu", dtype)


def sample(pipe: Kandinsky5, steps: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    own = pipe.transformer.config
    noise = torch.randn(2, 18, 22, own.out_visual_dim, generator=generator)
    shapes = (9, own.in_text_dim), (1, own.in_text_dim2), (5, own.in_text_dim), (1, own.in_text_dim2)
    return pipe.sample(*(torch.randn(*shape, generator=generator) for shape in shapes), noise=noise, steps=steps)


def texts(pipe: Kandinsky5) -> list[Tensor]:
    """What guides a video; its two prompts have other numbers of rows."""
    sampling = replace(pipe.sampling, negative_prompt=NEGATIVE, seed=0)
    conditions = pipe.encode(VideoRequest(PROMPT, VideoSettings((64, 48), 5), sampling))
    return [x.float() for branch in conditions[:2] for x in branch[:3]]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return ((actual - exact).norm() / exact.norm()).item()


def gathered(thing: Any) -> list[Any]:
    """What each process has."""
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, thing)
    return every


def own_bytes(model: torch.nn.Module) -> int:
    """What the parameters take on this process."""
    parameters = (getattr(one, "_local_tensor", one) for one in model.parameters())
    return sum(one.numel() * one.element_size() for one in parameters)
