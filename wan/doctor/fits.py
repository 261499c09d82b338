"""What fits into the memory that is free, by the estimates of `wan.memory`, which are on the large side."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from wan import memory
from wan.config import VideoSettings
from wan.memory import GIB
from wan.random_checkpoint import MODELS, Sizes, text_encoder_shapes, transformer_shapes, vae_shapes

SIZES = (1280, 720), (832, 480)
NAMES = {"t2v-14B": "14B", "t2v-1.3B": "1.3B"}
# Ways to place the models, with the flags that ask for them, from the fastest to the smallest.
RESIDENT, OFFLOADED, TEXT_ON_CPU = (), ("--offload_model true",), ("--offload_model true", "--t5_cpu")


@dataclass(frozen=True)
class Fit:
    """A video of 81 frames: what it needs at the most, the way to place the models with the least time that fits.

    flags: None if nothing fits; gib: of that way, else of the smallest
    """

    model: str
    weights: str
    size: tuple[int, int]
    gib: float
    flags: tuple[str, ...] | None


def fits(device: torch.device, free_gib: float, card_gib: float | None = None) -> tuple[Fit, ...]:
    """For each model, kind of weights and size, on a GPU of `card_gib` or a CPU (None), with so much memory free."""
    kinds = ("float32",) if device.type == "cpu" else ("bfloat16", "fp8")
    return tuple(
        _fit(model, weights, VideoSettings(size), free_gib, card_gib)
        for model in NAMES
        for weights in kinds
        for size in SIZES
    )


def _fit(model: str, weights: str, video: VideoSettings, free_gib: float, card_gib: float | None) -> Fit:
    needs = _needs(MODELS[model], weights, video, card_gib)
    chosen = next((flags for flags, gib in needs.items() if gib <= free_gib), None)
    gib = min(needs.values()) if chosen is None else needs[chosen]
    return Fit(NAMES[model], weights, video.size, gib, chosen)


def _needs(sizes: Sizes, weights: str, video: VideoSettings, card_gib: float | None) -> dict[tuple[str, ...], float]:
    """GiB by the flags of a way, the fastest first. What is decided by itself needs no flag."""
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    transformer, text, vae = map(_elements, (transformer_shapes, text_encoder_shapes, vae_shapes), [sizes] * 3)
    loaded = sum(transformer.values()) * dtype.itemsize
    kept = sum(n * (1 if weights == "fp8" and one else dtype.itemsize) for one, n in transformer.items())
    text_bytes, vae = sum(text.values()) * dtype.itemsize, sum(vae.values()) * 4
    work = memory.working_bytes(math.prod(video.token_grid), sizes.dim, sizes.ffn_dim, dtype.itemsize)
    resident = max(kept + text_bytes + vae + work, loaded + text_bytes + vae) / GIB
    if card_gib is None:
        return {RESIDENT: resident}
    # Layers turn into float8 on the GPU, where they are whole before. A decoder that lacks memory works in tiles.
    offloaded = max(kept + work, loaded, text_bytes) / GIB
    on_cpu = max(kept + work, loaded) / GIB
    if loaded + text_bytes + vae > memory.WEIGHT_SHARE * card_gib * GIB:
        return {RESIDENT: offloaded, ("--t5_cpu",): on_cpu}
    return {RESIDENT: resident, OFFLOADED: offloaded, TEXT_ON_CPU: on_cpu}


@functools.cache
def _elements(shapes: Callable[[Sizes], dict[str, tuple[int, ...]]], sizes: Sizes) -> dict[bool, int]:
    """How many numbers are in weights of the blocks' linear layers, and how many elsewhere."""
    count = {True: 0, False: 0}
    for name, shape in shapes(sizes).items():
        count[name.startswith("blocks.") and len(shape) == 2 and name.endswith(".weight")] += math.prod(shape)
    return count
