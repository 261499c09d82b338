"""A model over several processes, from outside: `apply_sequence`, `apply_fsdp`, and what guidance branches exchange."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import nabla
from nabla import InputError, Plan
from nabla.attention import ReusableBlockMask
from nabla.rotary import Rotary, rotate
from wan.attention.spec import TransformerSpec
from wan.parallel.peers import Peers, are_peers, make_peers

# Heads stay where they are while waiting for the process with most to do takes no more of the attention than this.
EVEN_ENOUGH = 1.01


def shares(count: int, parts: int) -> list[int]:
    """How many of `count` things each of `parts` gets, as evenly as can be, the first ones more."""
    return [count // parts + (part < count % parts) for part in range(parts)]


class Exchange(NamedTuple):
    """How processes that share a video swap tokens for heads around an attention (DeepSpeed-Ulysses, arXiv 2309.14509).

    name: of the process group; rank, size: of this process in it, and how many there are
    order: the heads, process by process, (H,) int64; None: as they come
    peers: memory that the others write into, where there is such; else all goes by collectives
    rotates_first: whether rotary angles come for the process's own tokens, rather than for all
    """

    name: str
    rank: int
    size: int
    order: Tensor | None = None
    peers: Peers | None = None
    rotates_first: bool = False

    def own_heads(self, heads: int) -> int:
        return shares(heads, self.size)[self.rank]

    def send(self, x: Tensor, number: int, tokens: int, rotary: Rotary) -> list[Tensor]:
        """Begin to swap q, k or v, `number` 0 to 2, (B, own tokens, H, D); the result is for `for_heads`."""
        if self.rotates_first and number < 2:
            x = rotate(x, rotary)
        if self.peers is None:
            return [self._send_heads(x, tokens)]
        parts = [x.index_select(2, heads) for heads in self.order.split(shares(x.shape[2], self.size))]
        self.peers.send(parts, number)
        return parts

    def for_heads(self, sent: list[list[Tensor]], batch: int, heads: int, tokens: int) -> list[Tensor]:
        """q, k and v, begun to be swapped by all processes: (B, tokens, own heads, D)."""
        if self.peers is not None:
            return self.peers.for_heads(sum(sent, []))
        shape = tokens, batch, self.own_heads(heads), -1
        return [collectives.wait_tensor(x).view(shape).transpose(0, 1) for (x,) in sent]

    def for_tokens(self, out: Tensor, heads: int) -> Tensor:
        """The way back: (B, tokens, own heads, D) -> (B, own tokens, H, D)."""
        if self.peers is not None:
            return self.peers.for_tokens(out, self.order.split(shares(heads, self.size))[self.rank])
        (batch, tokens, own, width), counts = out.shape, shares(heads, self.size)
        of_tokens = shares(tokens, self.size)
        sent = self._send(out.transpose(0, 1).flatten(), batch * width, own, of_tokens, of_tokens[self.rank], counts)
        parts = collectives.wait_tensor(sent).split([of_tokens[self.rank] * batch * n * width for n in counts])
        x = torch.cat([part.view(of_tokens[self.rank], batch, -1, width) for part in parts], dim=2)
        x = x if self.order is None else torch.empty_like(x).index_copy(2, self.order, x)
        return x.transpose(0, 1)

    def _send_heads(self, x: Tensor, tokens: int) -> Tensor:
        """Begin to swap (B, own tokens, H, D), to be waited for."""
        batch, _, heads, width = x.shape
        x, counts = x.transpose(0, 1), shares(heads, self.size)
        if self.order is not None:
            x = x.index_select(2, self.order)
        sent = torch.cat([part.flatten() for part in x.split(counts, dim=2)])
        of_tokens = shares(tokens, self.size)
        return self._send(sent, batch * width, of_tokens[self.rank], counts, counts[self.rank], of_tokens)

    def _send(self, x: Tensor, unit: int, kept: int, sent: list[int], own: int, got: list[int]) -> Tensor:
        """All-to-all of pieces of kept * sent[n] units, in return for own * got[n] units; to be waited for."""
        there, back = ([unit * one * other for other in each] for one, each in ((kept, sent), (own, got)))
        # The public function waits at once in compiled code.
        return torch.ops._c10d_functional.all_to_all_single(x, back, there, self.name)


def attend_together(
    sent: list[list[Tensor]],
    batch: int,
    heads: int,
    plan: Plan,
    rotary: Rotary,
    kept: ReusableBlockMask | None,
    share: Tensor | None,
    exchange: Exchange,
) -> Tensor:
    """`nabla.attend` where each process has some of the tokens, and attends to some heads.

    sent: of q, k and v, by `Exchange.send`; batch, heads: of all of them
    Returns (B, own tokens, heads, D).
    """
    qkv = exchange.for_heads(sent, batch, heads, plan.tokens)
    out = nabla.attend(*qkv, plan, None if exchange.rotates_first else rotary, kept, share)
    return exchange.for_tokens(out, heads)


def exchange_of_diffusers(parallel_config: Any) -> Exchange:
    """The exchange that diffusers' own context parallelism asks a processor for.

    Raises `InputError` for its ring, which never has all tokens of a head in one place.
    """
    config = parallel_config.context_parallel_config
    if config is None or config.ring_degree > 1:
        raise InputError(
            "sparse attention needs all tokens of a head in one place, which a ring never has; set ulysses_degree alone"
        )
    group = config._ulysses_mesh.get_group()
    return Exchange(group.group_name, group.rank(), group.size(), rotates_first=True)


def apply_sequence(transformer: nn.Module, mesh: DeviceMesh, spec: TransformerSpec) -> None:
    """Split the tokens of a transformer over a mesh of one dimension, in place; before `apply_attention`.

    Every process is given the same input and gets the same output. Blocks see a process's own tokens; attention sees
    all tokens of its own heads. Neither number has to be divisible. For inference, with one timestep a sample.
    """
    transformer.sequence = Sequence(transformer, mesh, spec)


def sequence_of(transformer: nn.Module) -> Sequence | None:
    """What `apply_sequence` left on a transformer."""
    return getattr(transformer, "sequence", None)


class Sequence:
    """What `apply_sequence` leaves on a transformer: the exchange of every layer, and the hooks around the blocks.

    Which process attends to which heads is chosen anew from the shares of blocks that they kept, since the others wait
    for the one that has most to do.
    """

    def __init__(self, transformer: nn.Module, mesh: DeviceMesh, spec: TransformerSpec):
        if sequence_of(transformer) is not None:
            raise InputError("the transformer is split by apply_sequence already")
        blocks = spec.blocks_of(transformer)
        self.spec, self.group, self.tokens = spec, mesh.get_group(), 0
        self.size, self.rank = mesh.size(), mesh.get_local_rank()
        self.heads, layers = spec.heads(transformer), len(blocks)
        if self.size > self.heads:
            raise InputError(f"ulysses_size {self.size} is more than the {self.heads} heads; lower it")
        self.order = interleaved(self.heads, self.size).repeat(layers, 1)
        self.on_device: Tensor | None = None
        # Whether processes write into each other's memory, found out at first use, and that memory.
        self.by_peers: bool | None = None
        self.head_size, self.peers, self.made_for = spec.head_size(transformer), None, None
        # Whether attention, before this forward, has asked how to swap tokens for heads.
        self.is_attended = False
        # Whether the shares last measured are those of an order before this one, since a cache left blocks out since.
        self.is_outdated = False
        transformer.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        blocks[0].register_forward_pre_hook(self._split, with_kwargs=True)
        spec.output_of(transformer).register_forward_hook(self._gather)

    def exchanges(
        self, batch: int, grid: tuple[int, int, int], dtype: torch.dtype, device: torch.device
    ) -> list[Exchange]:
        """The exchange of each layer for the tokens of a grid; all processes have to ask at once."""
        self.is_attended, tokens = True, math.prod(grid)
        with torch.inference_mode(False):
            if self.on_device is None or self.on_device.device != device:
                self.on_device = self.order.to(device)
                if self.by_peers is None:
                    self.by_peers = are_peers(self.group, device)
            if self.by_peers and self.made_for != (batch, tokens, dtype, device):
                counts = shares(tokens, self.size), shares(self.heads, self.size)
                self.peers = None
                like = torch.empty(0, dtype=dtype, device=device)
                self.peers = make_peers(self.group, *counts, batch, self.head_size, like)
                self.made_for = batch, tokens, dtype, device
        peers = self.peers if self.by_peers else None
        return [Exchange(self.group.group_name, self.rank, self.size, each, peers) for each in self.on_device]

    @property
    def own_order(self) -> Tensor:
        """The heads of this process, (layers, own heads), in the order in which it has them."""
        return self.order.split(shares(self.heads, self.size), dim=1)[self.rank]

    def balance(self, kept: Tensor) -> None:
        """Deal the heads out anew by the shares that each layer's own heads kept: (layers, own heads)."""
        if self.is_outdated:
            self.is_outdated = False
            return
        own = shares(self.heads, self.size)
        by_rank = all_gather(F.pad(kept, (0, own[0] - kept.shape[1])), self.group).cpu()
        loads = by_rank.sum(2)
        if loads.amax(0).sum() <= EVEN_ENOUGH * loads.mean(0).sum():
            return
        by_place = torch.cat([by_rank[rank, :, : own[rank]] for rank in range(self.size)], dim=1)
        self.order = dealt(torch.empty_like(by_place).scatter(1, self.order, by_place), own)
        self.on_device.copy_(self.order)

    def _before_forward(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        timestep = self.spec.inputs(transformer, args, kwargs).timestep
        if timestep.ndim > 1 or torch.is_grad_enabled():
            raise InputError("a transformer split by apply_sequence takes one timestep a sample, without gradients")

    def _split(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if not self.is_attended:
            raise InputError("after apply_sequence, blocks attend to a process's own tokens alone; use apply_attention")
        hidden = args[0] if args else kwargs["hidden_states"]
        self.tokens = hidden.shape[1]
        if self.tokens < self.size:
            raise InputError(f"{self.tokens} tokens are too few for ulysses_size {self.size}; lower it")
        own = hidden.split(shares(self.tokens, self.size), dim=1)[self.rank].contiguous()
        return ((own, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": own})

    def _gather(self, _: nn.Module, args: tuple, out: Tensor) -> Tensor:
        self.is_attended = False
        counts = shares(self.tokens, self.size)
        padded = F.pad(out, (0, 0, 0, counts[0] - out.shape[1])).transpose(0, 1).contiguous()
        parts = all_gather(padded, self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts)]).transpose(0, 1)


def interleaved(heads: int, parts: int) -> Tensor:
    """Heads dealt out in turn: (heads,), those of the first part first."""
    return torch.cat([torch.arange(part, heads, parts) for part in range(parts)])


def dealt(load: Tensor, counts: list[int]) -> Tensor:
    """Heads of each layer by their load (layers, H), dealt to parts of given counts so that these have as much to do.

    The heaviest first, each to the part that has least so far. Returns (layers, H), those of the first part first.
    """
    layers, left = torch.arange(len(load)), torch.tensor(counts).repeat(len(load), 1)
    sums, parts = torch.zeros(len(load), len(counts)), torch.empty_like(load, dtype=torch.int64)
    # Stable, since every process deals by itself.
    for heads in load.argsort(dim=1, descending=True, stable=True).T:
        part = sums.masked_fill(left == 0, float("inf")).argmin(dim=1)
        parts[layers, heads] = part
        sums[layers, part] += load[layers, heads]
        left[layers, part] -= 1
    return parts.argsort(dim=1, stable=True)


def gather_guidance(prediction: Tensor, mesh: DeviceMesh) -> tuple[Tensor, ...]:
    """The predictions of both guidance branches, each process having made its own; the same on both."""
    return all_gather(prediction, mesh.get_group()).unbind()


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all processes of a group, stacked."""
    gathered = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(gathered), x.contiguous(), group)
    return gathered


def apply_fsdp(model: nn.Module, blocks: nn.ModuleList, mesh: DeviceMesh) -> None:
    """Shard a model's parameters over a mesh of one dimension, in place, a block at a time gathered while it runs.

    The model may be on the meta device still. Its parameters must not require gradients where their dtypes differ.
    """
    for block in blocks:
        fully_shard(block, mesh=mesh)
    # A root keeps what it has gathered for a backward, which there is none of.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)
