"""Ulysses: processes that share a video swap tokens for heads around an attention, and swap back after it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor

import nabla
from nabla import InputError, Plan
from nabla.attention import ReusableBlockMask
from nabla.rotary import Rotary, rotate
from wan.parallel.head_balance import split_sizes
from wan.parallel.peers import PeerBuffers


class UlyssesAllToAll(NamedTuple):
    """How processes that share a video swap tokens for heads around an attention (DeepSpeed-Ulysses, arXiv 2309.14509).

    name: of the process group; rank, size: of this process in it, and how many there are
    order: the heads, process by process, (H,) int64; None: as they come
    peer_buffers: memory that the others write into, where there is such; else all goes by collectives
    rotates_first: whether rotary angles come for the process's own tokens, rather than for all
    """

    name: str
    rank: int
    size: int
    order: Tensor | None = None
    peer_buffers: PeerBuffers | None = None
    rotates_first: bool = False

    def own_heads(self, heads: int) -> int:
        return split_sizes(heads, self.size)[self.rank]

    def send(self, x: Tensor, number: int, tokens: int, rotary: Rotary) -> list[Tensor]:
        """Begin to swap q, k or v, `number` 0 to 2, (B, own tokens, H, D); the result is for `receive_heads`."""
        # v, the third, is not rotated.
        if self.rotates_first and number < 2:
            x = rotate(x, rotary)
        if self.peer_buffers is None:
            return [self._send_heads(x, tokens)]
        parts = [x.index_select(2, heads) for heads in self._heads_by_process(x.shape[2])]
        self.peer_buffers.send(parts, number)
        return parts

    def receive_heads(self, sent: list[list[Tensor]], batch: int, heads: int, tokens: int) -> list[Tensor]:
        """q, k and v, begun to be swapped by all processes: (B, tokens, own heads, D)."""
        if self.peer_buffers is not None:
            return self.peer_buffers.receive_heads(sum(sent, []))
        # What came from all processes, one behind the other, is one tensor since tokens lead in each.
        shape = tokens, batch, self.own_heads(heads), -1
        return [collectives.wait_tensor(x).view(shape).transpose(0, 1) for (x,) in sent]

    def return_tokens(self, out: Tensor, heads: int) -> Tensor:
        """The way back: (B, tokens, own heads, D) -> (B, own tokens, H, D)."""
        if self.peer_buffers is not None:
            return self.peer_buffers.return_tokens(out, self._heads_by_process(heads)[self.rank])
        (batch, tokens, own, width), counts = out.shape, split_sizes(heads, self.size)
        of_tokens = split_sizes(tokens, self.size)
        sent = self._send(out.transpose(0, 1).flatten(), batch * width, own, of_tokens, of_tokens[self.rank], counts)
        # Each process sends its own heads of these tokens: pieces of unequal width, put beside each other.
        parts = collectives.wait_tensor(sent).split([of_tokens[self.rank] * batch * n * width for n in counts])
        x = torch.cat([part.view(of_tokens[self.rank], batch, -1, width) for part in parts], dim=2)
        # From the order of processes to that of heads, the reverse of `index_select` in `_send_heads`.
        x = x if self.order is None else torch.empty_like(x).index_copy(2, self.order, x)
        return x.transpose(0, 1)

    def _heads_by_process(self, heads: int) -> tuple[Tensor, ...]:
        assert self.order is not None, "peer buffers come with an order"
        return self.order.split(split_sizes(heads, self.size))

    def _send_heads(self, x: Tensor, tokens: int) -> Tensor:
        """Begin to swap (B, own tokens, H, D), to be waited for."""
        batch, _, heads, width = x.shape
        x, counts = x.transpose(0, 1), split_sizes(heads, self.size)
        if self.order is not None:
            x = x.index_select(2, self.order)
        # For each process a piece (own tokens, B, its heads, D); a collective takes them as one line of numbers.
        sent = torch.cat([part.flatten() for part in x.split(counts, dim=2)])
        of_tokens = split_sizes(tokens, self.size)
        return self._send(sent, batch * width, of_tokens[self.rank], counts, counts[self.rank], of_tokens)

    def _send(self, x: Tensor, unit: int, kept: int, sent: list[int], own: int, got: list[int]) -> Tensor:
        """All-to-all of pieces of kept * sent[n] units, in return for own * got[n] units; to be waited for."""
        there, back = ([unit * one * other for other in each] for one, each in ((kept, sent), (own, got)))
        # The public function waits at once in compiled code, where nothing would be hidden behind the next product.
        return torch.ops._c10d_functional.all_to_all_single(x, back, there, self.name)


def ulysses_attend(
    sent: list[list[Tensor]],
    batch: int,
    heads: int,
    plan: Plan,
    rotary: Rotary,
    block_mask: ReusableBlockMask | None,
    density: Tensor | None,
    all_to_all: UlyssesAllToAll,
) -> Tensor:
    """`nabla.attend` where each process has some of the tokens, and attends to some heads.

    sent: of q, k and v, by `UlyssesAllToAll.send`; batch, heads: of all of them
    Returns (B, own tokens, heads, D).
    """
    q, k, v = all_to_all.receive_heads(sent, batch, heads, plan.tokens)
    out = nabla.attend(q, k, v, plan, None if all_to_all.rotates_first else rotary, block_mask, density)
    return all_to_all.return_tokens(out, heads)


def all_to_all_of_diffusers(parallel_config: Any) -> UlyssesAllToAll:
    """The all-to-all that diffusers' own context parallelism asks a processor for.

    Raises `InputError` for its ring, which never has all tokens of a head in one place.
    """
    config = parallel_config.context_parallel_config
    if config is None or config.ring_degree > 1:
        raise InputError(
            "sparse attention needs all tokens of a head in one place, which a ring never has; set ulysses_degree alone"
        )
    group = config._ulysses_mesh.get_group()
    return UlyssesAllToAll(group.group_name, group.rank(), group.size(), rotates_first=True)
