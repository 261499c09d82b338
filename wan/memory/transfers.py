"""How long streaming a transformer's blocks takes beside computing them, and how many to keep so that it shows less."""

from __future__ import annotations

from wan.memory.estimates import Weights, Workload
from wan.quantize.table import QUANTIZATIONS

# A block is computed from its weights once a token: this many tokens hide the transfer of half-precision weights from
# pinned host memory. 16,000 is 800 TFLOP/s over 50 GB/s; slower GPUs have slower links too.
TOKENS_TO_HIDE = 16_000
# How many times slower transfers from pageable memory are taken to be.
PAGEABLE = 4


def kept_blocks(transformer: Weights, quantization: str | None, workload: Workload, room: float, pinned: bool) -> int:
    """Blocks to keep on the GPU in `room` bytes: all, or none if their transfer is hidden, or as many as fit."""
    if transformer.bytes(quantization) <= room:
        return transformer.blocks
    if slowdown(transformer, quantization, workload, 0, pinned) == 1:
        return 0
    # The two buffers take the room of two blocks.
    return max(0, int((room - transformer.rest) // transformer.block(quantization)) - 2)


def slowdown(transformer: Weights, quantization: str | None, workload: Workload, kept: int, pinned: bool) -> float:
    """How many times as long a forward takes as without transfers, which go on while it computes."""
    share = 1 - kept / transformer.blocks
    smaller = transformer.block(quantization) / transformer.block(None)
    # Faster products hide less.
    smaller *= 1.0 if quantization is None else QUANTIZATIONS[quantization].speed
    hiding = TOKENS_TO_HIDE * (1 if pinned else PAGEABLE) * transformer.itemsize / 2
    # Computing `hiding` tokens takes as long as transferring all blocks in the run's type.
    return max(1.0, share * smaller * hiding / workload.tokens)
