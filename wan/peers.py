"""GPUs that reach each other's memory swap tokens for heads by writing each row where another process reads it.

NCCL's all-to-all packs rows into buffers, sends them at two thirds of what NVLink carries, and unpacks them. Here one
kernel reads each row once and writes it, over NVLink, to its place on the GPU that needs it.
"""

from __future__ import annotations

import socket
import weakref
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from nabla.gpu import tl, triton

# Tokens that a program copies, of one head.
TOKENS = 16
# What a row of a `Buffer.table` says of a process: see `_copy_rows`.
COLUMNS = 8


def are_peers(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether the processes of a group have each a GPU of one machine, all of which reach each other's memory.

    All of them have to ask at once.
    """
    if device.type != "cuda" or triton is None or torch.version.hip is not None:
        return False
    places: list[tuple[str, int]] = [None] * group.size()
    dist.all_gather_object(places, (socket.gethostname(), device.index), group)
    hosts, gpus = zip(*places)
    others = [index for index in gpus if index != device.index]
    own = len(set(hosts)) == 1 and len(set(gpus)) == len(gpus) and len(others) < torch.cuda.device_count()
    own = own and all(torch.cuda.can_device_access_peer(device, index) for index in others)
    answers = [None] * group.size()
    dist.all_gather_object(answers, own, group)
    return all(answers)


class Buffer(NamedTuple):
    """Memory of this process that the others write into.

    rows: (tensors, B, tokens, heads, D), what is written
    table: (processes, COLUMNS) int64, which rows go where
    """

    rows: Tensor
    table: Tensor


class Peers(NamedTuple):
    """Where q, k and v of a process's own heads arrive, and where the output of its own tokens does.

    Both are written in turn, layer by layer. Who writes one has waited until all had filled the other, which they do
    after reading what it held before, so nothing is overwritten that is still to be read.
    """

    heads: Buffer
    tokens: Buffer

    def swap_for_heads(self, qkv: list[Tensor], order: Tensor) -> list[Tensor]:
        """q, k and v (B, own tokens, H, D) -> (B, tokens, own heads, D); `order` is that of `Exchange`."""
        _write_rows(qkv, self.heads.rows, self.heads.table, order, True)
        return list(self.heads.rows.unbind())

    def swap_for_tokens(self, out: Tensor, order: Tensor) -> Tensor:
        """(B, tokens, own heads, D) -> (B, own tokens, H, D), which stands until the next layer's is written."""
        _write_rows([out], self.tokens.rows, self.tokens.table, order, False)
        return self.tokens.rows[0]


def make_peers(
    group: dist.ProcessGroup, tokens: list[int], heads: list[int], batch: int, width: int, like: Tensor
) -> Peers:
    """The memory for sequences of one size; all processes of the group have to make it at once.

    tokens, heads: how many each process has; width: D; like: a tensor of the dtype and device
    """
    rank, every = group.rank(), range(group.size())
    starts = [(sum(tokens[:n]), sum(heads[:n])) for n in every]
    arrive = (3, batch, sum(tokens), heads[rank], width), 3 * batch * sum(tokens) * max(heads) * width
    leave = (1, batch, tokens[rank], sum(heads), width), batch * max(tokens) * sum(heads) * width
    # First token here, how many; first token there, tokens there; heads to write, heads there; their place in order.
    to_heads = [[0, tokens[rank], starts[rank][0], sum(tokens), heads[n], heads[n], starts[n][1]] for n in every]
    to_tokens = [[starts[n][0], tokens[n], 0, tokens[n], heads[rank], sum(heads), starts[rank][1]] for n in every]
    return Peers(_buffer(group, *arrive, to_heads, like), _buffer(group, *leave, to_tokens, like))


class Shared(NamedTuple):
    """What writing into a `Buffer` takes beside it.

    handle: torch's, of the memory of all processes
    tokens, heads: the most that one process gets of this one
    """

    handle: object
    tokens: int
    heads: int


# By address: operators take nothing but tensors and values, and a value would be compiled in, anew for other memory.
_SHARED: dict[int, Shared] = {}


def _buffer(group: dist.ProcessGroup, shape: tuple[int, ...], most: int, rows: list[list[int]], like: Tensor) -> Buffer:
    """most: elements of the largest of all processes' shapes, since they are given out alike."""
    memory = symmetric_memory.empty(most, dtype=like.dtype, device=like.device)
    handle = symmetric_memory.rendezvous(memory, group)
    addresses = [handle.get_buffer(rank, (most,), like.dtype).data_ptr() for rank in range(group.size())]
    table = [[address, *row] for address, row in zip(addresses, rows)]
    written, address = memory[: torch.Size(shape).numel()].view(shape), memory.data_ptr()
    _SHARED[address] = Shared(handle, max(row[1] for row in rows), max(row[4] for row in rows))
    weakref.finalize(written, _SHARED.pop, address, None)
    return Buffer(written, torch.tensor(table, device=like.device))


@torch.library.custom_op("wan::write_rows", mutates_args=("written",))
def _write_rows(rows: list[Tensor], written: Tensor, table: Tensor, order: Tensor, to_heads: bool) -> None:
    """Copy rows to where `table` says, and wait until all processes have filled `written`."""
    shared = _SHARED.get(written.data_ptr())
    if shared is None:
        raise RuntimeError("the memory that other GPUs write into was copied, and what they write would be lost")
    batch, width = len(rows[0]), rows[0].shape[3]
    if rows[0].dtype != written.dtype or len(rows) != len(written) or batch != written.shape[1]:
        own, wanted = (f"{len(x)} of {tuple(x[0].shape)} {x[0].dtype}" for x in (rows, written))
        raise RuntimeError(f"rows to swap are {own}, but there is memory for {wanted}")
    with torch.cuda.device(written.device):
        for number, x in enumerate(rows):
            x = x if x.stride(3) == 1 else x.contiguous()
            _copy_rows[(len(table) * triton.cdiv(shared.tokens, TOKENS), shared.heads, batch)](
                x,
                table,
                order,
                len(table),
                number * batch,
                *x.stride()[:3],
                width,
                TO_HEADS=to_heads,
                COLUMNS=COLUMNS,
                TOKENS=TOKENS,
                WIDTH=triton.next_power_of_2(width),
            )
        shared.handle.barrier(channel=0)


if triton is not None:

    @triton.jit
    def _copy_rows(
        x,
        table,
        order,
        processes,
        samples_before,
        of_batch,
        of_token,
        of_head,
        width,
        TO_HEADS: tl.constexpr,
        COLUMNS: tl.constexpr,
        TOKENS: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        """Rows of a head and some tokens to one process; those for all processes are on their way at once."""
        row = table + tl.program_id(0) % processes * COLUMNS
        head, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        first, count = tl.load(row + 1), tl.load(row + 2)
        there, tokens_there = tl.load(row + 3), tl.load(row + 4)
        heads, heads_there, place = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
        if head < heads:
            token = (tl.program_id(0) // processes * TOKENS + tl.arange(0, TOKENS))[:, None]
            column = tl.arange(0, WIDTH)[None, :]
            inside = (token < count) & (column < width)
            other = tl.load(order + place + head)
            here, head_there = (other, head) if TO_HEADS else (head, other)
            source = x + sample * of_batch + (first + token) * of_token + here * of_head + column
            to = ((samples_before + sample) * tokens_there + there + token) * heads_there + head_there
            # Nothing is known of an address from memory, and what is not aligned is written two bytes at a time.
            address = tl.multiple_of(tl.load(row).to(tl.pointer_type(x.dtype.element_ty)), 16)
            tl.store(address + to * width + column, tl.load(source, mask=inside), mask=inside)
