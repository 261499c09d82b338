"""A model whose blocks wait in host memory and pass through two buffers on the GPU, the next one while one computes.

diffusers' group offloading does the same with tensors of their own: it holds host memory twice while it starts, rounds
each pinned tensor up to a power of two, waits for the GPU after each block, and breaks where torchao's tensors are
pinned already. Here a block is one piece of memory in either place, and the host never waits.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from nabla import InputError
from wan.memory.estimates import GIB, pinned_chunks
from wan.memory.pieces import bytes_of, leaves_of, tensors_of


def stream_blocks(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    device: torch.device,
    kept: int = 0,
    pinned: bool = True,
    left_out: Callable[[nn.Module], bool] | None = None,
    always: int = 1,
) -> BlockStream:
    """Move a model to host memory; from then on it runs within `module.block_stream.opened()`.

    blocks: parts of `module` that run one after the other, in this order or another
    kept: how many of the first ones are on the GPU for all of that time
    pinned: whether the host memory is pinned, so that transfers go on beside computing
    left_out: asked of `module` when a block is called: whether something stands in for it, so that its weights are not
        needed; but not of the first `always`, which run in every forward
    """
    stream = BlockStream(module, blocks, device, kept, pinned, left_out, always)
    module.block_stream = stream  # type: ignore[assignment]  # a module takes any attribute
    return stream


class BlockStream:
    """What `stream_blocks` leaves on a model. While it is not open, all weights are in host memory."""

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[nn.Module],
        device: torch.device,
        kept: int,
        pinned: bool,
        left_out: Callable[[nn.Module], bool] | None,
        always: int,
    ):
        self.device = device
        self.kept = kept
        self.left_out, self.always = left_out, always
        self.leaves = [leaves_of(block) for block in blocks]
        self.sizes = [bytes_of(leaves) for leaves in self.leaves]
        # The model holds its stream, which in turn would keep it, and all weights, until Python looks for cycles.
        self.module = weakref.ref(module)
        self.inside = {id(tensor) for block in blocks for tensor in tensors_of(block)}
        self.host: list[Tensor] = []
        # From here on the blocks' tensors are views of these pieces; what they were before is freed.
        self._fill_host(pinned and device.type == "cuda")
        for tensor in self._rest():
            tensor.data = tensor.data.to("cpu")
        self.copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers: list[Tensor] = []
        self.whole: dict[int, Tensor] = {}
        # What each buffer holds, and events of its last transfer and its last use.
        self.holds: list[int | None] = [None, None]
        self.arrived: list[torch.cuda.Event | None] = [None, None]
        self.used: list[torch.cuda.Event | None] = [None, None]
        # To whom kept blocks are handed over and in how many forwards, how often each has run since; what was received.
        self.heir: BlockStream | None = None
        self.forwards = 0
        self.runs: Counter[int] = Counter()
        self.received: dict[int, Tensor] = {}
        self._watch(blocks)

    def _watch(self, blocks: Sequence[nn.Module]) -> None:
        for number, block in enumerate(blocks):
            if number >= self.kept:
                # Before other hooks, which may look at weights, and outside of the compiled block; after errors, too.
                block.register_forward_pre_hook(partial(self._before, number), prepend=True)
                block.register_forward_hook(partial(self._after, number), always_call=True)
            else:
                block.register_forward_pre_hook(partial(self._before_kept, number), prepend=True)
                block.register_forward_hook(partial(self._after_kept, number))

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold buffers, kept blocks and all that is outside of blocks on the device."""
        # Nothing is copied back: a run does not change weights, so that those in host memory are still right.
        waiting = [(tensor, tensor.data) for tensor in self._rest()]
        try:
            for tensor, data in waiting:
                tensor.data = data.to(self.device)
            for number in range(self.kept):
                memory = self.received.pop(number, None)
                if memory is None:
                    memory = self.host[number][: self.sizes[number]].to(self.device, copy=True)
                self.whole[number] = memory
                self._put(number, self.whole[number])
            if self.kept < len(self.host):
                # With one streamed block there is one buffer: the next block is always itself, and there already.
                size = max(self.sizes[self.kept :])
                slots = min(2, len(self.host) - self.kept)
                self.buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(slots)]
            yield
        finally:
            self._close()
            for tensor, data in waiting:
                tensor.data = data

    def hand_over_to(self, heir: BlockStream, forwards: int = 1) -> None:
        """Give the memory of kept blocks to those of another model of the same sizes, which is opened after this one.

        Called while this is open, before its last `forwards` forwards. In the last of them each block, as soon as it
        has run, leaves its memory to the heir's block of the same number, whose weights are brought there while later
        blocks compute. So the heir opens at once, and both never take more than one of them. Blocks that no forward
        calls any more, and those that are larger in the heir, are brought as it opens. An heir that is not opened after
        all has to `let_go`, after this one was closed.
        """
        self.heir, self.forwards = heir, forwards
        self.runs.clear()

    def let_go(self) -> None:
        """Free what was handed over to this one."""
        self.received.clear()

    def _close(self) -> None:
        if self.copying is not None:
            # A transfer that still goes on would write into a buffer that has become other memory.
            torch.cuda.synchronize(self.device)
        for number, memory in enumerate(self.host):
            self._put(number, memory)
        self.buffers, self.whole = [], {}
        self.holds, self.arrived, self.used = [None, None], [None, None], [None, None]
        self.heir = None
        self.let_go()

    def _fill_host(self, pinned: bool) -> None:
        first = 0
        for count in pinned_chunks(max(self.sizes), len(self.sizes)):
            size = max(self.sizes)
            try:
                chunk = torch.empty(count * size, dtype=torch.uint8, pin_memory=pinned)
            except RuntimeError as error:
                amount = f"{count * size / GIB:.1f} GiB more of {'pinned ' if pinned else ''}host memory"
                raise InputError(f"the machine has no {amount} for weights: {str(error).splitlines()[0]}") from error
            for number in range(first, first + count):
                memory = chunk[(number - first) * size :][:size]
                for leaf in self.leaves[number]:
                    # Block by block, so that beside what is copied no more than one piece of memory is there twice.
                    leaf.view(memory).copy_(getattr(leaf.owner, leaf.name))
                self._put(number, memory)
                self.host.append(memory)
            first += count

    def _put(self, number: int, memory: Tensor) -> None:
        for leaf in self.leaves[number]:
            leaf.put(memory)

    def _model(self) -> nn.Module:
        module = self.module()
        # Who calls this is the model itself, or holds it.
        assert module is not None
        return module

    def _rest(self) -> list[Tensor]:
        return [tensor for tensor in tensors_of(self._model()) if id(tensor) not in self.inside]

    @torch.compiler.disable
    def _before(self, number: int, *_: object) -> None:
        if not self.buffers:
            raise RuntimeError("a model whose blocks are streamed runs within block_stream.opened() alone")
        if number >= self.always and self.left_out is not None and self.left_out(self._model()):
            return
        if number not in self.holds:
            # Not asked for before: the first one since it was opened, or blocks before it were left out or came in
            # another order. A transfer waits for its buffer's last use, so that either will do.
            self._fetch(number, 0)
        slot = self.holds.index(number)
        if self.copying is not None:
            arrived = self.arrived[slot]
            assert arrived is not None
            # What computes waits for the transfer, on the GPU; the host goes on.
            torch.cuda.current_stream(self.device).wait_event(arrived)
        self._put(number, self.buffers[slot])
        # Behind the last block comes the next forward, which begins with the first that is streamed.
        after = number + 1 if number + 1 < len(self.host) else self.kept
        if after not in self.holds:
            self._fetch(after, 1 - slot)

    @torch.compiler.disable
    def _after(self, number: int, *_: object) -> None:
        if number not in self.holds:
            # Left out, so that it was not put anywhere.
            return
        slot = self.holds.index(number)
        if self.copying is not None:
            self.used[slot] = torch.cuda.current_stream(self.device).record_event()
        # So that its buffer can be filled anew, and whoever looks at the weights between forwards finds them.
        self._put(number, self.host[number])

    @torch.compiler.disable
    def _before_kept(self, number: int, *_: object) -> None:
        if self.heir is not None and number not in self.whole:
            raise RuntimeError(f"block {number} runs again after it was handed over; say more forwards")

    @torch.compiler.disable
    def _after_kept(self, number: int, *_: object) -> None:
        heir = self.heir
        if heir is None:
            return
        self.runs[number] += 1
        fits = number < heir.kept and heir.sizes[number] <= self.sizes[number]
        if self.runs[number] < self.forwards or not fits:
            return
        size = heir.sizes[number]
        memory = heir.received[number] = self.whole.pop(number)[:size]
        self._put(number, self.host[number])
        if self.copying is None:
            memory.copy_(heir.host[number][:size])
            return
        # The transfer waits for the block, and `_close` for the transfer.
        used = torch.cuda.current_stream(self.device).record_event()
        with torch.cuda.stream(self.copying):
            self.copying.wait_event(used)
            memory.copy_(heir.host[number][:size], non_blocking=True)

    def _fetch(self, number: int, slot: int) -> None:
        """Start the transfer of a block, after what uses the buffer."""
        self.holds[slot] = number
        size = self.sizes[number]
        if self.copying is None:
            self.buffers[slot][:size].copy_(self.host[number][:size])
            return
        used = self.used[slot]
        if used is None:
            # The buffer may be memory that other work on this stream still writes to.
            used = self.used[slot] = torch.cuda.current_stream(self.device).record_event()
        # Without `record_stream`: buffers are freed by `_close` alone, which waits for both streams.
        with torch.cuda.stream(self.copying):
            self.copying.wait_event(used)
            self.buffers[slot][:size].copy_(self.host[number][:size], non_blocking=True)
            self.arrived[slot] = self.copying.record_event()
