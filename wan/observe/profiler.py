"""What a transformer does in each sampling step: densities of its block masks, times of its blocks, example masks.

Nothing waits for a GPU while a step is under way. Times are those between events on the GPU, put down by hooks around
the blocks, which stay outside compiled graphs, and by the operators within them (`nabla.probe`); densities are written
by the graphs themselves. All is read back when the next step has been asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nabla import Plan, probe
from wan.attention.apply import applied_attention
from wan.caches.applied import step_cache_of
from wan.caches.ran import ran_in_full
from wan.memory.estimates import GIB
from wan.memory.peak import peak_gpu_bytes, peak_host_bytes
from wan.observe.step_trace import BLOCK, DENSE, MaskSample, Span, StepTrace, Timestamp
from wan.parallel.distributed import DistributedContext
from wan.parallel.layout import ParallelLayout
from wan.parallel.sequence_parallel import SequenceParallel


class Profiler(probe.Probe):
    """Watches a transformer's forwards while entered.

    times: whether to time blocks and what is in them
    examples: the steps of which to keep example masks
    Of processes that share a video each must have one: their densities are put together in `end_step`.
    """

    def __init__(
        self,
        transformer: nn.Module,
        blocks: nn.ModuleList,
        device: torch.device,
        distributed: DistributedContext | None = None,
        times: bool = False,
        examples: Container[int] = (),
    ):
        self.transformer, self.device, self.distributed = transformer, device, distributed
        self.applied = applied_attention(transformer)
        self.layers = self.applied.layers if self.applied else []
        self.blocks = blocks
        self.layout = ParallelLayout() if distributed is None else distributed.layout
        self.times, self.examples = times, examples
        self.layer: int | None = None
        self.part: str | None = None
        self.head = 0
        self.sequence_parallel = self.applied.sequence_parallel if self.applied else None
        sparse = self.applied.sparse_layers if self.applied else []
        self.example_layers = {sparse[0], sparse[len(sparse) // 2], sparse[-1]} if sparse else set()
        # By which heads were assigned last, and where its own stand among all, on the device.
        self.order = self.places = torch.empty(0)

    def __enter__(self) -> Profiler:
        with ExitStack() as stack:
            if self.applied:
                self.applied.watch(True)
                stack.callback(self.applied.watch, False)
            # Hooks run in the order in which they were put on. Those of `apply_attention` are there already, so the
            # layers' plans are those of the forward that begins.
            hooks = [
                self.transformer.register_forward_pre_hook(self._before_forward),
                self.transformer.register_forward_hook(self._after_forward),
            ]
            looks_inside = self.times or bool(self.examples)
            for layer, block in enumerate(self.blocks if looks_inside else ()):
                hooks.append(block.register_forward_pre_hook(partial(self._before_block, layer)))
                hooks.append(block.register_forward_hook(self._after_block))
            for hook in hooks:
                stack.callback(hook.remove)
            if looks_inside:
                stack.enter_context(probe.listening(self))
            # All is on; had anything above raised, leaving this block would have taken off what was.
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stack.close()

    def begin_step(self, step: int) -> None:
        self.trace = StepTrace(step, Timestamp.now(self.device))

    def end_step(self) -> StepTrace:
        """What was seen of the step, which can be read once the device has come to its `end`."""
        trace = self.trace
        if self.applied and self.applied.sparse:
            densities = torch.stack(trace.densities)
            if self.layout.processes_per_video > 1:
                densities = self._of_all(densities)
            # Into pinned memory, as torch chooses for such copies, so that nothing waits. Read only once the device is
            # at `end`.
            trace.host_densities = densities.to("cpu", non_blocking=True)
        if self.device.type == "cuda":
            used, peak = torch.cuda.memory_allocated(self.device), peak_gpu_bytes(self.device)
            trace.memory = {"gpu_gib": used / GIB, "gpu_peak_gib": peak / GIB}
        trace.memory["host_peak_gib"] = peak_host_bytes() / GIB
        # After the copies, so that whoever has waited for it has them too.
        trace.end = Timestamp.now(self.device)
        return trace

    def run(self, part: str, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        # A part within a part is counted with the outer one, and what is outside the blocks not at all.
        if self.layer is None or self.part is not None or not self.times:
            return function(*args, **kwargs)
        self.part, start = part, Timestamp.now(self.device)
        try:
            return function(*args, **kwargs)
        finally:
            self.trace.spans.append(Span(self.layer, part, start, Timestamp.now(self.device)))
            self.part = None

    def see(self, counts: Callable[[], Tensor], blocks: Callable[[Tensor], Tensor]) -> None:
        """Keep the heads that keep least and most, of those that are attended to together."""
        layer = self.layer
        # Densities are added after a forward: while there are none, it is the first of the step.
        wanted = layer in self.example_layers and self.trace.step in self.examples and not self.trace.densities
        if layer is None or not wanted:
            return
        # (heads, N) of the first of the batch; (1, N) if all heads are alike.
        count = counts()[0].float()
        by_head = count.mean(dim=1)
        heads = torch.stack((by_head.argmin(), by_head.argmax()))
        plan, sequence = self.layers[layer].plan, self.sequence_parallel
        sample = MaskSample(
            layer,
            before=self.head,
            own=None if sequence is None else sequence.own_head_order[layer],
            heads=heads.to("cpu", non_blocking=True),
            densities=(by_head[heads] / count.shape[1]).to("cpu", non_blocking=True),
            blocks=blocks(heads)[0].to("cpu", non_blocking=True),
            alike=plan is not None and plan.fixed is not None,
        )
        self.trace.mask_samples.append(sample)
        # Of many tokens, heads are attended to in groups; the next group's begin here.
        self.head += len(by_head)

    def _before_block(self, layer: int, *_: Any) -> None:
        self.layer, self.head = layer, 0
        # Blocks run one after another and never within each other, so one start is enough.
        self.block_start = Timestamp.now(self.device)

    def _after_block(self, *_: Any) -> None:
        if self.times and self.layer is not None:
            self.trace.spans.append(Span(self.layer, BLOCK, self.block_start, Timestamp.now(self.device)))
        self.layer = None

    def _before_forward(self, *_: Any) -> None:
        written = [
            layer.density for layer, plan in zip(self.layers, self._plans()) if plan and layer.density is not None
        ]
        if written:
            # No head keeps nothing, so that a layer that does not run in this forward is known by its zeros. By what
            # was there heads have been assigned already.
            torch._foreach_zero_(written)

    def _after_forward(self, *_: Any) -> None:
        plans = self._plans()
        self.trace.kernels = [plan.backend if plan else DENSE for plan in plans]
        cache = step_cache_of(self.transformer)
        # How many layers ran, from the first: a cache that reuses the rest still computes its leading ones.
        ran = len(plans) if cache is None or ran_in_full(self.transformer, self.blocks[0]) else cache.leading
        if not (self.applied and self.applied.sparse):
            # Without sparse layers, (layers, 1): 1 for each that ran.
            self.trace.densities.append((torch.arange(len(plans)) < ran).float()[:, None])
            return
        # In one forward either all sparse layers choose blocks or all take them over.
        first = self.applied.sparse[0]
        if any(plans[:ran]):
            self.trace.reused_masks.append(first.block_mask is not None and first.block_mask.reuse)
        sequence = self.sequence_parallel
        dense = torch.ones(first.heads if sequence is None else sequence.own_head_order.shape[1], device=self.device)
        rows = []
        for number, (layer, plan) in enumerate(zip(self.layers, plans)):
            written = layer.density if plan else None
            unwritten = dense if number < ran else torch.zeros_like(dense)
            rows.append(unwritten if written is None else written)
        # Copied here, since the next forward writes over the layers' own memory.
        own = torch.stack(rows)
        self.trace.densities.append(own if sequence is None else self._in_order(own, sequence))

    def _plans(self) -> list[Plan | None]:
        """By layer that of its sparse attention in this forward, or None."""
        if not self.layers:
            return [None] * len(self.blocks)
        plans = (layer.plan for layer in self.layers)
        return [plan if plan is not None and plan.selection is not None else None for plan in plans]

    def _in_order(self, own: Tensor, sequence: SequenceParallel) -> Tensor:
        """Densities (layers, own heads) at the places of these among all heads, as this forward has them."""
        # Assigned anew they are another tensor, so that they are copied to the device only then.
        if self.order is not sequence.head_order:
            self.order, self.places = sequence.head_order, sequence.own_head_order.to(self.device)
        return own.new_zeros(len(own), sequence.heads).scatter(1, self.places, own)

    def _of_all(self, densities: Tensor) -> Tensor:
        """Densities (forwards, layers, heads) of all heads; of both guidance branches, one after the other, where these
        run apart.
        """
        assert self.distributed is not None, "one process has all heads and branches"
        # Each process fills in its own branch and heads and leaves zeros elsewhere, so that the sum has all of them.
        whole = densities.new_zeros(self.layout.cfg, *densities.shape)
        whole[self.distributed.cfg_mesh.get_local_rank()] = densities
        dist.all_reduce(whole, group=self.distributed.video_mesh.get_group())
        return whole.flatten(0, 1)
