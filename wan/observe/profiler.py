"""What a transformer does in each sampling step: shares of blocks that heads keep, times of its blocks, example masks.

Nothing waits for a GPU while a step is under way. Times are those between events on the GPU, put down by hooks around
the blocks, which stay outside compiled graphs, and by the operators within them (`nabla.probe`); shares are written by
the graphs themselves. All is read back when the next step has been asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nabla import Plan, probe
from wan.caches.step_cache import ran_in_full
from wan.memory import placement as memory
from wan.parallel.distributed import DistributedContext
from wan.parallel.layout import ParallelLayout

BLOCK = "block"
DENSE = "sdpa"


class Mark(NamedTuple):
    """A moment: of a GPU's work, or of the clock."""

    event: torch.cuda.Event | None
    seconds: float

    @classmethod
    def now(cls, device: torch.device) -> Mark:
        if device.type != "cuda":
            return cls(None, time.perf_counter())
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return cls(event, 0.0)

    def wait(self) -> None:
        """Until the device has come to it."""
        if self.event is not None:
            self.event.synchronize()

    def milliseconds_to(self, end: Mark) -> float:
        """Only after the device has come to `end`."""
        if self.event is None:
            return 1000 * (end.seconds - self.seconds)
        return self.event.elapsed_time(end.event)


class Span(NamedTuple):
    """A part of a layer's work, `BLOCK` or one that `nabla.probe` names, from a moment to another."""

    layer: int
    part: str
    start: Mark
    end: Mark


class Example(NamedTuple):
    """The blocks that a head keeps in a step's first forward, (N, N) bool, and their share.

    head: None for all of them alike
    """

    step: int
    layer: int
    head: int | None
    share: float
    blocks: np.ndarray


class Look(NamedTuple):
    """Heads that were attended to together, of which these keep least and most blocks.

    before: how many of the layer's own heads came before them; own: the numbers of all own heads, None if they are all
    heads; heads, shares: of the two, among those together; blocks: theirs, (2, N, N) bool; alike: whether it is a
    window alone, the same for all heads
    """

    layer: int
    before: int
    own: Tensor | None
    heads: Tensor
    shares: Tensor
    blocks: Tensor
    alike: bool


@dataclass
class Seen:
    """What was seen of one step on the device, while it may still be at work."""

    step: int
    start: Mark
    end: Mark | None = None
    # Each (layers, heads), zero where others have the head or the layer did not run; (layers, 1) if all are dense.
    forwards: list[Tensor] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)  # by layer
    took_over: list[bool] = field(default_factory=list)  # by forward that attended sparsely: blocks of an earlier one
    spans: list[Span] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    kept: Tensor | None = None  # on its way to the host: (forwards, layers, heads); None if all layers are dense
    memory: dict[str, float] = field(default_factory=dict)


class Watch(probe.Probe):
    """Watches a transformer's forwards while entered.

    times: whether to time blocks and what is in them
    examples: the steps of which to keep example masks
    Of processes that share a video each must have one: their shares are put together in `end`.
    """

    def __init__(
        self,
        transformer: nn.Module,
        device: torch.device,
        distributed: DistributedContext | None = None,
        times: bool = False,
        examples: Container[int] = (),
    ):
        self.transformer, self.device, self.distributed = transformer, device, distributed
        self.applied = getattr(transformer, "nabla", None)
        self.attentions = [block.attn1 for block in transformer.blocks]
        self.layout = ParallelLayout() if distributed is None else distributed.layout
        self.times, self.examples = times, examples
        self.layer: int | None = None
        self.part: str | None = None
        self.head = 0
        sparse = [n for n, module in enumerate(self.attentions) if self.applied and module in self.applied.sparse]
        self.example_layers = {sparse[0], sparse[len(sparse) // 2], sparse[-1]} if sparse else set()
        self.order = self.places = torch.empty(0)

    def __enter__(self) -> Watch:
        with ExitStack() as stack:
            if self.applied:
                self.applied.watch(True)
                stack.callback(self.applied.watch, False)
            hooks = [
                self.transformer.register_forward_pre_hook(self._before_forward),
                self.transformer.register_forward_hook(self._after_forward),
            ]
            looks_inside = self.times or bool(self.examples)
            for layer, block in enumerate(self.transformer.blocks if looks_inside else ()):
                hooks.append(block.register_forward_pre_hook(partial(self._before_block, layer)))
                hooks.append(block.register_forward_hook(self._after_block))
            for hook in hooks:
                stack.callback(hook.remove)
            if looks_inside:
                stack.enter_context(probe.listening(self))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stack.close()

    def begin(self, step: int) -> None:
        self.seen = Seen(step, Mark.now(self.device))

    def end(self) -> Seen:
        """What was seen of the step; for `measures` once the device has come that far."""
        seen = self.seen
        if self.applied and self.applied.sparse:
            kept = torch.stack(seen.forwards)
            seen.kept = (kept if self.layout.processes_per_video == 1 else self._of_all(kept)).to(
                "cpu", non_blocking=True
            )
        if self.device.type == "cuda":
            used, peak = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
            seen.memory = {"gpu_gib": used / memory.GIB, "gpu_peak_gib": peak / memory.GIB}
        seen.memory["host_peak_gib"] = memory.peak_host_bytes() / memory.GIB
        seen.end = Mark.now(self.device)
        return seen

    def run(self, part: str, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.layer is None or self.part is not None or not self.times:
            return function(*args, **kwargs)
        self.part, start = part, Mark.now(self.device)
        try:
            return function(*args, **kwargs)
        finally:
            self.seen.spans.append(Span(self.layer, part, start, Mark.now(self.device)))
            self.part = None

    def see(self, counts: Callable[[], Tensor], blocks: Callable[[Tensor], Tensor]) -> None:
        """Keep the heads that keep least and most, of those that are attended to together."""
        wanted = self.layer in self.example_layers and self.seen.step in self.examples and not self.seen.forwards
        if not wanted:
            return
        count = counts()[0].float()
        by_head = count.mean(dim=1)
        heads = torch.stack((by_head.argmin(), by_head.argmax()))
        there = [x.to("cpu", non_blocking=True) for x in (heads, by_head[heads] / count.shape[1], blocks(heads)[0])]
        sequence = self.applied.sequence
        own = None if sequence is None else sequence.own_order[self.layer]
        alike = self.attentions[self.layer].nabla_plan.fixed is not None
        self.seen.looks.append(Look(self.layer, self.head, own, *there, alike))
        self.head += len(by_head)

    def _before_block(self, layer: int, *_: Any) -> None:
        self.layer, self.head = layer, 0
        self.block_start = Mark.now(self.device)

    def _after_block(self, *_: Any) -> None:
        if self.times:
            self.seen.spans.append(Span(self.layer, BLOCK, self.block_start, Mark.now(self.device)))
        self.layer = None

    def _before_forward(self, *_: Any) -> None:
        written = [module.nabla_share for module, plan in zip(self.attentions, self._plans()) if plan]
        if written:
            # No head keeps nothing, so that a layer that does not run in this forward is known by its zeros. By what
            # was there heads have been dealt out already.
            torch._foreach_zero_(written)

    def _after_forward(self, *_: Any) -> None:
        plans = self._plans()
        self.seen.kernels = [plan.backend if plan else DENSE for plan in plans]
        cache = getattr(self.transformer, "step_cache", None)
        ran = len(plans) if cache is None or ran_in_full(self.transformer) else cache.leading
        if not (self.applied and self.applied.sparse):
            self.seen.forwards.append((torch.arange(len(plans)) < ran).float()[:, None])
            return
        first = self.applied.sparse[0]
        if any(plans[:ran]):
            self.seen.took_over.append(first.nabla_kept is not None and first.nabla_kept.reuse)
        sequence = self.applied.sequence
        dense = torch.ones(first.heads if sequence is None else sequence.own_order.shape[1], device=self.device)
        none = torch.zeros_like(dense)
        rows = zip(self.attentions, plans)
        kept = [module.nabla_share if plan else dense if n < ran else none for n, (module, plan) in enumerate(rows)]
        kept = torch.stack(kept)
        self.seen.forwards.append(kept if sequence is None else self._in_order(kept))

    def _plans(self) -> list[Plan | None]:
        """By layer that of its sparse attention in this forward, or None."""
        plans = (getattr(module, "nabla_plan", None) for module in self.attentions)
        return [plan if plan is not None and plan.selection is not None else None for plan in plans]

    def _in_order(self, own: Tensor) -> Tensor:
        """Shares (layers, own heads) at the places of these among all heads, as they are dealt out in this forward."""
        sequence = self.applied.sequence
        if self.order is not sequence.order:
            self.order, self.places = sequence.order, sequence.own_order.to(self.device)
        return own.new_zeros(len(own), sequence.heads).scatter(1, self.places, own)

    def _of_all(self, kept: Tensor) -> Tensor:
        """Forwards (forwards, layers, heads) of all heads, and of both guidance branches where these run apart."""
        whole = kept.new_zeros(self.layout.cfg, *kept.shape)
        whole[self.distributed.cfg_mesh.get_local_rank()] = kept
        dist.all_reduce(whole, group=self.distributed.video_mesh.get_group())
        return whole.flatten(0, 1)
