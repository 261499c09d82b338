"""GPUs that reach each other's memory swap tokens for heads by writing each row where another process reads it.

NCCL's all-to-all packs rows into buffers, sends them at two thirds of what NVLink carries, and unpacks them. Here q, k
and v are copied to where they are needed by the engines that a GPU has for that, beside its matrix products; the output
by a kernel that reads each row once and writes it, over NVLink, to its place.
"""

from __future__ import annotations

import math
import socket
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from nabla.kernels.gpu import tl, triton

# Tokens that a program copies, of one head.
TOKENS = 16


def are_peers(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether the processes of a group have each a GPU of one machine, all of which reach each other's memory.

    All of them have to ask at once.
    """
    if device.type != "cuda" or triton is None or torch.version.hip is not None:
        return False
    places: list[Any] = [None] * group.size()
    dist.all_gather_object(places, (socket.gethostname(), device.index), group)
    hosts, gpus = zip(*places)
    # Numbers are a process's own: where each sees one GPU alone, all are 0, and none of them can be told apart.
    others = [index for index in gpus if index != device.index]
    own = len(set(hosts)) == 1 and len(set(gpus)) == len(gpus) and len(others) < torch.cuda.device_count()
    own = own and all(torch.cuda.can_device_access_peer(device, index) for index in others)
    # All or none, since the others would wait for a process that goes by collectives.
    answers = [None] * group.size()
    dist.all_gather_object(answers, own, group)
    return all(answers)


class PeerBuffers(NamedTuple):
    """Where q, k and v of a process's own heads arrive, and where the output of its own tokens does.

    Both are written in turn, layer by layer. Who writes one has waited until all had filled the other, which they do
    after reading what it held before, so nothing is overwritten that is still to be read.

    heads: (3, B, tokens, own heads, D); tokens: (B, own tokens, H, D)
    table: (processes, 3) int64: of each process the address of its `tokens`, its first token, and how many it has
    """

    heads: Tensor
    tokens: Tensor
    table: Tensor

    def send(self, parts: list[Tensor], number: int) -> None:
        """Let q, k or v, `number` 0 to 2, be on its way to all processes, beside what the GPU does next.

        parts: for each process its heads (B, own tokens, its heads, D); they have to stand until `receive_heads`
        """
        _send_parts(parts, number, self.heads)

    def receive_heads(self, sent: list[Tensor]) -> list[Tensor]:
        """q, k and v (B, tokens, own heads, D), once all processes have sent theirs; `sent`: parts of this one."""
        _await_parts(sent, self.heads)
        return list(self.heads.unbind())

    def return_tokens(self, out: Tensor, order: Tensor) -> Tensor:
        """(B, tokens, own heads, D) -> (B, own tokens, H, D), which stands until the next layer's is written.

        order: which of all heads the own ones are, (own heads,) int64
        """
        _write_rows(out, self.tokens, self.table, order)
        return self.tokens


def make_peer_buffers(
    group: dist.ProcessGroup, tokens: list[int], heads: list[int], batch: int, width: int, like: Tensor
) -> PeerBuffers:
    """The memory for sequences of one size; all processes of the group have to make it at once.

    tokens, heads: how many each process has; width: D; like: a tensor of the dtype and device
    """
    rank, firsts = group.rank(), [sum(tokens[:n]) for n in range(group.size())]
    # (3, B, tokens, heads of the process, D) and (B, tokens of the process, H, D).
    arriving = _allocate(group, [(3, batch, sum(tokens), count, width) for count in heads], like)
    leaving = _allocate(group, [(batch, count, sum(heads), width) for count in tokens], like)
    own = slice(firsts[rank], firsts[rank] + tokens[rank])
    # To the next process first and to this one last, so that not all of them write to one at once.
    others = [(rank + n) % group.size() for n in range(1, group.size() + 1)]
    places = [(n, arriving.every[n][:, :, own]) for n in others]
    table = [[memory.data_ptr(), *of] for memory, *of in zip(leaving.every, firsts, tokens)]
    _register(arriving, CopyTarget(arriving.handle, places, torch.cuda.Stream(like.device)))
    _register(leaving, CopyTarget(leaving.handle))
    return PeerBuffers(arriving.own, leaving.own, torch.tensor(table, device=like.device))


class SymmetricBuffer(NamedTuple):
    """Memory of this process, that of every process as this one reaches it, and torch's handle of it."""

    own: Tensor
    every: list[Tensor]
    handle: Any


def _allocate(group: dist.ProcessGroup, shapes: list[tuple[int, ...]], like: Tensor) -> SymmetricBuffer:
    """shapes: of each process; all get memory for the largest, since it is given out alike."""
    rank, most = group.rank(), max(map(math.prod, shapes))
    memory = symmetric_memory.empty(most, dtype=like.dtype, device=like.device)
    handle = symmetric_memory.rendezvous(memory, group)
    every = [handle.get_buffer(n, shape, like.dtype) for n, shape in enumerate(shapes)]
    return SymmetricBuffer(memory[: math.prod(shapes[rank])].view(shapes[rank]), every, handle)


class CopyTarget(NamedTuple):
    """What writing into memory takes beside it.

    handle: torch's, of the memory of all processes
    places: processes, and where in their memory tokens of this one go
    beside: where these are copied, beside what the GPU does next
    """

    handle: Any
    places: Sequence[tuple[int, Tensor]] = ()
    beside: torch.cuda.Stream | None = None


# By address: operators take nothing but tensors and values, and a value would be compiled in, anew for other memory.
_TARGETS: dict[int, CopyTarget] = {}


def _register(memory: SymmetricBuffer, target: CopyTarget) -> None:
    address = memory.own.data_ptr()
    _TARGETS[address] = target
    # Forgotten with its memory: another may get the address.
    weakref.finalize(memory.own, _TARGETS.pop, address, None)


def _target_of(written: Tensor) -> CopyTarget:
    target = _TARGETS.get(written.data_ptr())
    if target is None:
        raise RuntimeError("the memory that other GPUs write into was copied, and what they write would be lost")
    return target


def _copy_stream(written: Tensor) -> torch.cuda.Stream:
    """Where parts are copied to memory that q, k and v arrive in."""
    beside = _target_of(written).beside
    assert beside is not None, "output is written by a kernel, beside nothing"
    return beside


def _check_rows(x: Tensor, shape: torch.Size, written: Tensor) -> None:
    if x.dtype != written.dtype or x.shape != shape:
        own, wanted = f"{tuple(x.shape)} {x.dtype}", f"{tuple(shape)} {written.dtype}"
        raise RuntimeError(f"rows to swap are {own}, but there is memory for {wanted}")


@torch.library.custom_op("wan::send_parts", mutates_args=("written",))
def _send_parts(parts: list[Tensor], number: int, written: Tensor) -> None:
    """Begin to copy a part to each process, where it is the number-th tensor of these tokens."""
    target, beside = _target_of(written), _copy_stream(written)
    # Parts are still being made, by what the GPU was given before.
    beside.wait_stream(torch.cuda.current_stream(written.device))
    with torch.cuda.stream(beside):
        for process, place in target.places:
            _check_rows(parts[process], place.shape[1:], written)
            # A sample is one piece of memory here and there, which needs no kernel, for which products would wait.
            for sample, there in zip(parts[process], place[number]):
                there.copy_(sample)


@torch.library.custom_op("wan::await_parts", mutates_args=("written",))
def _await_parts(sent: list[Tensor], written: Tensor) -> None:
    """Wait until all processes have filled `written`; what this one has sent has to stand until now."""
    # `sent` is an argument so that compiled code holds it until now: the stream beside is unknown to it.
    target, beside = _target_of(written), _copy_stream(written)
    with torch.cuda.device(written.device):
        torch.cuda.current_stream().wait_stream(beside)
        # Of the GPUs, in this stream; the host goes on.
        target.handle.barrier(channel=0)


@torch.library.custom_op("wan::write_rows", mutates_args=("written",))
def _write_rows(x: Tensor, written: Tensor, table: Tensor, order: Tensor) -> None:
    """Copy rows to where `table` says, and wait until all processes have filled `written`."""
    target = _target_of(written)
    batch, tokens, heads, width = x.shape
    _check_rows(x, torch.Size((len(written), tokens, len(order), written.shape[3])), written)
    x = x if x.stride(3) == 1 else x.contiguous()
    with torch.cuda.device(written.device):
        # Of the processes those with most tokens have `tokens / processes`, rounded up. Processes run fastest, so that
        # programs side by side write to different GPUs.
        programs = len(table) * triton.cdiv(triton.cdiv(tokens, len(table)), TOKENS), heads, batch
        _copy_rows[programs](
            x,
            table,
            order,
            len(table),
            *x.stride()[:3],
            written.shape[2],
            width,
            TOKENS=TOKENS,
            WIDTH=triton.next_power_of_2(width),
        )
        target.handle.barrier(channel=0)


if triton is not None:

    @triton.jit
    def _copy_rows(
        x,
        table,
        order,
        processes,
        of_batch,
        of_token,
        of_head,
        heads_there,
        width,
        TOKENS: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        """Rows of a head and some tokens to one process; those for all processes are on their way at once."""
        row = table + tl.program_id(0) % processes * 3
        first, count = tl.load(row + 1), tl.load(row + 2)
        head, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        token = (tl.program_id(0) // processes * TOKENS + tl.arange(0, TOKENS))[:, None]
        column = tl.arange(0, WIDTH)[None, :]
        inside = (token < count) & (column < width)
        # x is (B, tokens, own heads, D), and what is written (B, count, heads_there, D).
        source = x + sample * of_batch + (first + token) * of_token + head * of_head + column
        to = (sample * count + token) * heads_there + tl.load(order + head)
        # Nothing is known of an address from memory, and what is not aligned is written two bytes at a time.
        address = tl.multiple_of(tl.load(row).to(tl.pointer_type(x.dtype.element_ty)), 16)
        tl.store(address + to * width + column, tl.load(source, mask=inside), mask=inside)
