"""What stands in the places of a transformer's blocks while it is measured: each runs, is watched, or is left out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nabla import NablaConfig
from wan.attention.apply import applied_attention
from wan.attention.spec import Argument, TransformerSpec
from wan.memory.budget import host_bytes
from wan.memory.placement import free_bytes

# What is done in place of a block: given the block and its arguments, its output.
Role = Callable[[nn.Module, tuple, dict[str, Any]], Any]
# Outputs of blocks that a forward left out are kept on a GPU if they take at most this part of what is free there.
ON_GPU = 4


class Seat(nn.Module):
    """In the place of a block of a transformer, which it runs unless it has another role."""

    def __init__(self, block: nn.Module):
        super().__init__()
        # As a part of this one, so that the transformer still finds its weights.
        self.block = block
        self.role: Role | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs) if self.role is None else self.role(self.block, args, kwargs)


class Seats:
    """The seats of a transformer, and what each layer keeps: a share of its blocks, of which 1 is dense."""

    def __init__(self, transformer: nn.Module, spec: TransformerSpec):
        applied = applied_attention(transformer)
        assert applied is not None and len(applied.sparse_layers) == len(applied.layers), "all layers can be sparse"
        self.transformer, self.spec, self.layers = transformer, spec, applied.layers
        self.config, self.plans = applied.config, applied.plans
        # Of the forward that is under way: what a plan depends on beside the share.
        self.place: tuple[tuple[int, int, int], torch.device, torch.dtype] | None = None
        self.keep: Sequence[float] = [1.0] * len(self.layers)
        self.seats: list[Seat] = []
        self.inputs: list[Argument] = []

    @contextmanager
    def taken(self) -> Iterator[Seats]:
        """Have a seat in the place of each block, all layers dense."""
        # After the attention's own, which says to each layer what it does by its config.
        hook = self.transformer.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        lists = [(getattr(self.transformer, one.name), one.states[0]) for one in self.spec.blocks]
        self.seats, self.inputs = [], []
        for blocks, states in lists:
            for number, block in enumerate(blocks):
                blocks[number] = Seat(block)
                self.seats.append(blocks[number])
                self.inputs.append(states)
        try:
            yield self
        finally:
            hook.remove()
            for blocks, _ in lists:
                for number, seat in enumerate(blocks):
                    blocks[number] = seat.block

    @contextmanager
    def roles(self, roles: Mapping[int, Role]) -> Iterator[None]:
        """Let some layers' seats have a role."""
        try:
            for layer, role in roles.items():
                self.seats[layer].role = role
            yield
        finally:
            for layer in roles:
                self.seats[layer].role = None

    @contextmanager
    def keeping(self, keep: Sequence[float]) -> Iterator[None]:
        """Have each layer keep a share in the forwards within."""
        before, self.keep = self.keep, keep
        try:
            yield
        finally:
            self.keep = before

    def only(self, layer: int, share: float) -> Sequence[float]:
        """Shares by which one layer keeps that and all others are dense."""
        return [share if n == layer else 1.0 for n in range(len(self.layers))]

    def set(self, layer: int, share: float) -> None:
        """Have a layer keep a share for the rest of the forward that is under way."""
        assert self.place is not None, "a forward is under way"
        plan = None if share == 1 else self.plans.of(at_share(self.config, share), *self.place)
        self.layers[layer].plan = plan

    def _before_forward(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = self.spec.inputs(transformer, args, kwargs)
        self.place = inputs.grid, inputs.device, inputs.dtype
        for layer, share in enumerate(self.keep):
            self.set(layer, share)


class Kept:
    """Outputs of blocks in a dense forward, which stand in for those that later forwards leave out.

    seats: whose blocks they are of; layers: that later forwards begin with
    In a single list of blocks only what goes into those layers is kept, as nothing else reads it.
    """

    def __init__(self, seats: Seats, layers: Collection[int]):
        self.seats = seats
        self.several = len(seats.spec.blocks) > 1
        last = max(layers, default=0)
        self.kept = set(range(last)) if self.several else {layer - 1 for layer in layers if layer > 0}
        self.outputs: dict[int, list[Tensor]] = {}
        self.is_tuple: dict[int, bool] = {}

    def put(self, layer: int, output: Any) -> None:
        """Keep what a block gave, in host memory unless a GPU has much room."""
        if layer not in self.kept:
            return
        tensors = list(output) if isinstance(output, tuple) else [output]
        self.is_tuple[layer] = isinstance(output, tuple)
        self.outputs[layer] = [self._placed(tensor) for tensor in tensors]

    def _placed(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda" or tensor.nbytes * len(self.kept) * ON_GPU < free_bytes(tensor.device):
            return tensor
        return tensor.to("cpu")

    def roles(self, layer: int) -> dict[int, Role]:
        """Roles by which a forward begins with a layer."""
        return {number: self._left_out(number, layer) for number in range(layer)}

    def _left_out(self, number: int, first: int) -> Role:
        states = self.seats.inputs[number]

        def left_out(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            given = states.of(args, kwargs)
            if number not in self.outputs or not (self.several or number == first - 1):
                # Nobody looks at it.
                return given
            tensors = [one.to(given.device) for one in self.outputs[number]]
            return tuple(tensors) if self.is_tuple[number] else tensors[0]

        return left_out


def groups_that_fit(layers: Sequence[int], nbytes: int, device: torch.device) -> list[list[int]]:
    """Layers in groups of which the outputs before them, of so many bytes each, fit into half of the host's memory."""
    free = host_bytes()[0] // 2
    most = max(1, free // max(1, nbytes)) if device.type == "cuda" else len(layers)
    return [list(layers[first : first + most]) for first in range(0, len(layers), max(1, most))]


def at_share(config: NablaConfig, share: float) -> NablaConfig:
    """The attention of a config with a share of blocks instead of its rule, in all layers and steps."""
    own = {name: getattr(config, name) for name in ("window", "tile", "pool", "dropped", "backend")}
    return NablaConfig(keep=share, **own)
