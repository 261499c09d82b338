"""A transformer's tokens split over processes, from outside: `apply_sequence_parallel`."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from nabla import InputError
from wan.attention.spec import Argument, TransformerSpec
from wan.parallel.collectives import all_gather
from wan.parallel.head_balance import assign_heads, interleaved, split_sizes
from wan.parallel.peers import PeerBuffers, are_peers, make_peer_buffers
from wan.parallel.ulysses import UlyssesAllToAll

# Heads stay where they are while waiting for the process with most to do takes no more of the attention than this.
EVEN_ENOUGH = 1.01


def apply_sequence_parallel(transformer: nn.Module, mesh: DeviceMesh, spec: TransformerSpec) -> None:
    """Split the tokens of a transformer over a mesh of one dimension, in place; before `apply_attention`.

    Every process is given the same input and gets the same output. Blocks see a process's own tokens; attention sees
    all tokens of its own heads. Neither number has to be divisible. For inference, with one timestep a sample or one a
    token.
    """
    transformer.sequence_parallel = SequenceParallel(transformer, mesh, spec)  # type: ignore[assignment]


def sequence_parallel_of(transformer: nn.Module) -> SequenceParallel | None:
    """What `apply_sequence_parallel` left on a transformer."""
    return getattr(transformer, "sequence_parallel", None)


class SequenceParallel:
    """What `apply_sequence_parallel` leaves on a transformer: the all-to-all of every layer, hooks around the blocks.

    Which process attends to which heads is chosen anew from the densities of their block masks, since the others wait
    for the one that has most to do.
    """

    def __init__(self, transformer: nn.Module, mesh: DeviceMesh, spec: TransformerSpec):
        if sequence_parallel_of(transformer) is not None:
            raise InputError("the transformer is split by apply_sequence_parallel already")
        if not spec.splits:
            raise InputError(
                f"{spec.kind.__name__} cannot be split over processes, since between its blocks it takes tokens by "
                "their frame; leave it whole"
            )
        blocks = spec.blocks_of(transformer)
        self.spec, self.group, self.tokens = spec, mesh.get_group(), 0
        self.size, self.rank = mesh.size(), mesh.get_local_rank()
        self.heads, layers = spec.heads(transformer), len(blocks)
        if self.size > self.heads:
            raise InputError(f"ulysses_size {self.size} is more than the {self.heads} heads; lower it")
        self.head_order = interleaved(self.heads, self.size).repeat(layers, 1)
        self.device_order: Tensor | None = None
        # Whether processes write into each other's memory, found out at first use, and that memory.
        self.by_peers: bool | None = None
        self.head_size = spec.head_size(transformer)
        self.peer_buffers: PeerBuffers | None = None
        self.buffers_for: tuple[int, int, torch.dtype, torch.device] | None = None
        # Whether attention, before this forward, has asked how to swap tokens for heads.
        self.is_attended = False
        # Whether the densities last measured are of an order before this one, since a cache left blocks out since.
        self.is_outdated = False
        # Hooks stay outside the compiled graphs of blocks. Most output layers, too, treat each token by itself, and
        # what they make of one is less to gather.
        transformer.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        for one in spec.blocks:
            first = getattr(transformer, one.name)[0]
            first.register_forward_pre_hook(partial(self._split, states=one.states), with_kwargs=True)
        last = blocks[-1] if spec.output_needs_grid else spec.output_of(transformer)
        last.register_forward_hook(self._gather)

    def all_to_alls(
        self, batch: int, grid: tuple[int, int, int], dtype: torch.dtype, device: torch.device
    ) -> list[UlyssesAllToAll]:
        """The all-to-all of each layer for the tokens of a grid; all processes have to ask at once."""
        self.is_attended, tokens = True, math.prod(grid)
        # What is kept for other forwards could not be written in place outside of inference mode if it were made in it.
        with torch.inference_mode(False):
            if self.device_order is None or self.device_order.device != device:
                self.device_order = self.head_order.to(device)
                if self.by_peers is None:
                    self.by_peers = are_peers(self.group, device)
            if self.by_peers and self.buffers_for != (batch, tokens, dtype, device):
                counts = split_sizes(tokens, self.size), split_sizes(self.heads, self.size)
                # Freed before the next is asked for.
                self.peer_buffers = None
                like = torch.empty(0, dtype=dtype, device=device)
                self.peer_buffers = make_peer_buffers(self.group, *counts, batch, self.head_size, like)
                self.buffers_for = batch, tokens, dtype, device
        buffers = self.peer_buffers if self.by_peers else None
        return [
            UlyssesAllToAll(self.group.group_name, self.rank, self.size, each, buffers) for each in self.device_order
        ]

    @property
    def own_head_order(self) -> Tensor:
        """The heads of this process, (layers, own heads), in the order in which it has them."""
        return self.head_order.split(split_sizes(self.heads, self.size), dim=1)[self.rank]

    def rebalance(self, densities: Tensor) -> None:
        """Assign the heads anew by the densities of each layer's own heads, (layers, own heads); on all processes."""
        if self.is_outdated:
            self.is_outdated = False
            return
        own = split_sizes(self.heads, self.size)
        by_rank = all_gather(F.pad(densities, (0, own[0] - densities.shape[1])), self.group).cpu()
        # (processes, layers), of (processes, layers, own heads). Each layer waits for the greatest load.
        loads = by_rank.sum(2)
        if loads.amax(0).sum() <= EVEN_ENOUGH * loads.mean(0).sum():
            return
        # (layers, H), in the order that heads have so far. All processes compute the same, of the same.
        by_place = torch.cat([by_rank[rank, :, : own[rank]] for rank in range(self.size)], dim=1)
        self.head_order = assign_heads(torch.empty_like(by_place).scatter(1, self.head_order, by_place), own)
        # In place: this forward's all-to-alls have been given out already.
        if self.device_order is not None:
            self.device_order.copy_(self.head_order)

    def _before_forward(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # A forward that failed on its way has left what was asked for it.
        self.is_attended = False
        if torch.is_grad_enabled():
            raise InputError("a transformer split by apply_sequence_parallel runs without gradients")

    def with_own_timesteps(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Arguments of a forward of the transformer, with those timesteps alone that are of this process's tokens.

        Where each token has its own, (B, tokens), all that is made of them is as long.
        """
        timestep = self.spec.timestep.of(args, kwargs)
        return self.spec.timestep.put(self._own(timestep), args, kwargs) if timestep.ndim > 1 else (args, kwargs)

    def _own(self, x: Tensor) -> Tensor:
        """This process's part of what has a column a token, (B, tokens, ...)."""
        return x.split(split_sizes(x.shape[1], self.size), dim=1)[self.rank]

    def _split(
        self, _: nn.Module, args: tuple, kwargs: dict[str, Any], states: tuple[Argument, ...]
    ) -> tuple[tuple, dict[str, Any]]:
        """The states (B, tokens, C) that a list's first block is given, of each this process's own tokens."""
        # The hook of `apply_attention` on the transformer has run by now, and has asked for all-to-alls.
        if not self.is_attended:
            raise InputError(
                "after apply_sequence_parallel, blocks attend to a process's own tokens alone; use apply_attention"
            )
        for state in states:
            x = state.of(args, kwargs)
            self.tokens = x.shape[1]
            if self.tokens < self.size:
                raise InputError(f"{self.tokens} tokens are too few for ulysses_size {self.size}; lower it")
            # Of a batch of one, `contiguous` would leave the strides of all tokens, for which compiled blocks would
            # have a second graph.
            own = self._own(x).clone(memory_format=torch.contiguous_format)
            args, kwargs = state.put(own, args, kwargs)
        return args, kwargs

    def _gather(self, _: nn.Module, args: tuple, out: Tensor) -> Tensor:
        """(B, own tokens, C) of the output layer or the last block -> (B, tokens, C), the same on all processes."""
        counts = split_sizes(self.tokens, self.size)
        # All gather pieces of one size, that of the first, which has most. Tokens lead, so that pieces are whole
        # stretches of memory.
        padded = F.pad(out, (0, 0, 0, counts[0] - out.shape[1])).transpose(0, 1).contiguous()
        parts = all_gather(padded, self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts)]).transpose(0, 1)
