"""What transformers do in each sampling step: densities of their block masks, times of blocks, example masks.

Nothing waits for a GPU while a step is under way. Times are those between events on the GPU, put down by hooks around
the blocks, which stay outside compiled graphs, and by the operators within them (`nabla.probe`); densities are written
by the graphs themselves. All is read back when the next step has been asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nabla import Plan, probe
from wan.attention.apply import applied_attention
from wan.attention.spec import TransformerSpec
from wan.caches.applied import step_cache_of
from wan.caches.ran import ran_in_full
from wan.config.model_settings import EXPERTS
from wan.memory.estimates import GIB
from wan.memory.peak import peak_gpu_bytes, peak_host_bytes
from wan.observe.step_trace import BLOCK, DENSE, MaskSample, Span, StepTrace, Timestamp
from wan.parallel.distributed import DistributedContext
from wan.parallel.layout import ParallelLayout
from wan.parallel.sequence_parallel import SequenceParallel


class Watched:
    """A transformer that is watched, and what of its attention is read."""

    def __init__(self, transformer: nn.Module, blocks: nn.ModuleList, expert: str | None):
        self.transformer, self.blocks, self.expert = transformer, blocks, expert
        self.applied = applied_attention(transformer)
        self.layers = self.applied.layers if self.applied else []
        self.sequence_parallel = self.applied.sequence_parallel if self.applied else None
        self.sparse = self.applied.sparse if self.applied else []
        numbers = self.applied.sparse_layers if self.applied else []
        self.example_layers = {numbers[0], numbers[len(numbers) // 2], numbers[-1]} if numbers else set()

    def plans(self) -> list[Plan | None]:
        """By layer that of its sparse attention in the last forward, or None."""
        if not self.layers:
            return [None] * len(self.blocks)
        plans = (layer.plan for layer in self.layers)
        return [plan if plan is not None and plan.selection is not None else None for plan in plans]


class Profiler(probe.Probe):
    """Watches the forwards of transformers while entered, of which one runs in each step.

    times: whether to time blocks and what is in them
    examples: the steps of which to keep example masks
    Of processes that share a video each must have one: their densities are put together in `end_step`.
    """

    def __init__(
        self,
        transformers: Sequence[nn.Module],
        spec: TransformerSpec,
        device: torch.device,
        distributed: DistributedContext | None = None,
        times: bool = False,
        examples: Container[int] = (),
    ):
        self.device, self.distributed = device, distributed
        names = EXPERTS if len(transformers) > 1 else (None,)
        self.every = [Watched(one, spec.blocks_of(one), name) for one, name in zip(transformers, names)]
        # The one whose forward began last.
        self.now = self.every[0]
        self.layout = ParallelLayout() if distributed is None else distributed.layout
        self.times, self.examples = times, examples
        self.layer: int | None = None
        self.part: str | None = None
        self.head = 0
        # By which heads were assigned last, and where its own stand among all, on the device.
        self.order = self.places = torch.empty(0)

    def __enter__(self) -> Profiler:
        with ExitStack() as stack:
            looks_inside = self.times or bool(self.examples)
            for watched in self.every:
                self._watch(watched, stack, looks_inside)
            if looks_inside:
                stack.enter_context(probe.listening(self))
            # All is on; had anything above raised, leaving this block would have taken off what was.
            self.stack = stack.pop_all()
        return self

    def _watch(self, watched: Watched, stack: ExitStack, looks_inside: bool) -> None:
        if watched.applied:
            watched.applied.watch(True)
            stack.callback(watched.applied.watch, False)
        # Hooks run in the order in which they were put on. Those of `apply_attention` are there already, so the layers'
        # plans are those of the forward that begins.
        hooks = [
            watched.transformer.register_forward_pre_hook(partial(self._before_forward, watched)),
            watched.transformer.register_forward_hook(self._after_forward),
        ]
        for layer, block in enumerate(watched.blocks if looks_inside else ()):
            hooks.append(block.register_forward_pre_hook(partial(self._before_block, layer)))
            hooks.append(block.register_forward_hook(self._after_block))
        for hook in hooks:
            stack.callback(hook.remove)

    def __exit__(self, *_: Any) -> None:
        self.stack.close()

    def begin_step(self, step: int) -> None:
        self.trace = StepTrace(step, Timestamp.now(self.device))

    def end_step(self) -> StepTrace:
        """What was seen of the step, which can be read once the device has come to its `end`."""
        trace = self.trace
        if self.now.sparse:
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
        wanted = layer in self.now.example_layers and self.trace.step in self.examples and not self.trace.densities
        if layer is None or not wanted:
            return
        # (heads, N) of the first of the batch; (1, N) if all heads are alike.
        count = counts()[0].float()
        by_head = count.mean(dim=1)
        heads = torch.stack((by_head.argmin(), by_head.argmax()))
        plan, sequence = self.now.layers[layer].plan, self.now.sequence_parallel
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

    def _before_forward(self, watched: Watched, *_: Any) -> None:
        self.now, self.trace.expert = watched, watched.expert
        written = [
            layer.density for layer, plan in zip(watched.layers, watched.plans()) if plan and layer.density is not None
        ]
        if written:
            # No head keeps nothing, so that a layer that does not run in this forward is known by its zeros. By what
            # was there heads have been assigned already.
            torch._foreach_zero_(written)

    def _after_forward(self, *_: Any) -> None:
        now = self.now
        plans = now.plans()
        self.trace.kernels = [plan.backend if plan else DENSE for plan in plans]
        cache = step_cache_of(now.transformer)
        # How many layers ran, from the first: a cache that reuses the rest still computes its leading ones.
        ran = len(plans) if cache is None or ran_in_full(now.transformer, now.blocks[0]) else cache.leading
        if not now.sparse:
            # Without sparse layers, (layers, 1): 1 for each that ran.
            self.trace.densities.append((torch.arange(len(plans)) < ran).float()[:, None])
            return
        # In one forward either all sparse layers choose blocks or all take them over.
        if any(plans[:ran]):
            first = next(layer for layer, plan in zip(now.layers, plans) if plan)
            self.trace.reused_masks.append(first.block_mask is not None and first.block_mask.reuse)
        sequence = now.sequence_parallel
        dense = torch.ones(
            now.sparse[0].heads if sequence is None else sequence.own_head_order.shape[1], device=self.device
        )
        rows = []
        for number, (layer, plan) in enumerate(zip(now.layers, plans)):
            written = layer.density if plan else None
            unwritten = dense if number < ran else torch.zeros_like(dense)
            rows.append(unwritten if written is None else written)
        # Copied here, since the next forward writes over the layers' own memory.
        own = torch.stack(rows)
        self.trace.densities.append(own if sequence is None else self._in_order(own, sequence))

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
