"""Where models lie, and estimates of GPU memory, for choices that are made before it runs out: on the large side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wan.parallel.fsdp import is_sharded

if TYPE_CHECKING:
    from wan.memory.streaming import BlockStream

# Part of a GPU that weights may fill when a 720p forward still has to fit beside them.
WEIGHT_SHARE = 0.6
# Float32 and working-precision copies of the hidden states that a block holds at once, besides its feed-forward.
HIDDEN_COPIES = 6


@contextmanager
def on_device(module: nn.Module, device: torch.device, offload: bool) -> Iterator[nn.Module]:
    """A model on the device it runs on, and back in host memory afterwards if idle ones are offloaded.

    One whose weights are sharded stays where it is; of one whose blocks are streamed a few at a time are there.
    """
    stream = _stream_of(module)
    if stream is not None:
        with stream.opened():
            yield module
        return
    if not offload or is_sharded(module):
        yield module
        return
    waiting = [
        (owner, name, parameter, parameter.data)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        # Not quantised ones, which are of other classes.
        if type(parameter) is nn.Parameter and type(parameter.data) is Tensor and parameter.device.type == "cpu"
    ]
    try:
        yield module.to(device)
    finally:
        # Weights change in type at most, and to copy them back would take longer than to bring them there.
        # A VAE's do where its decoder overflows and goes on in float32.
        for owner, name, parameter, data in waiting:
            moved = owner._parameters[name]
            if moved is not None and moved.dtype == data.dtype:
                parameter.data = data
                owner._parameters[name] = parameter
        module.to("cpu")


class Experts:
    """Models that take turns, of which the one whose turn it is is on its device; see `experts_on_device`.

    models: in the order in which they run; device, offload: as of `on_device`
    """

    def __init__(self, models: Sequence[nn.Module], device: torch.device, offload: bool):
        self.models, self.device, self.offload = tuple(models), device, offload
        self.now: int | None = None
        self.place = ExitStack()

    def turn_to(self, number: int) -> nn.Module:
        """The model of that number on its device, the one before it gone where it waits. Nothing to do if it is."""
        if number != self.now:
            self.place.close()
            self.now = None
            self.place.enter_context(on_device(self.models[number], self.device, self.offload))
            self.now = number
        return self.models[number]

    def prepare(self, number: int, forwards: int) -> None:
        """Let the model of that number come as the one whose turn it is goes: called before the latter's last
        `forwards` forwards (those of its last step), after which `turn_to` finds the next one's weights there.

        Of models that move as a whole, or lie on the device in any case, there is nothing to prepare.
        """
        assert self.now is not None, "a model goes after its turn has come"
        stream, heir = (_stream_of(self.models[n]) for n in (self.now, number))
        if number != self.now and stream is not None and heir is not None:
            stream.hand_over_to(heir, forwards)


@contextmanager
def experts_on_device(models: Sequence[nn.Module], device: torch.device, offload: bool) -> Iterator[Experts]:
    """One model after the other on the device that they run on, as `on_device` has a single one there.

    For a walk down the steps, in which each runs for some and never two at once::

        with experts_on_device(pipe.transformers, pipe.device, pipe.offload) as experts:
            experts.turn_to(number[0])                          # before what depends on the memory that is left
            for step in range(steps):
                experts.turn_to(number[step])
                if step + 1 < steps and number[step + 1] != number[step]:
                    experts.prepare(number[step + 1], forwards)  # of this step: 2 with guidance, 1 as one batch
                ...

    Where nothing is offloaded all of them stay there. After an error, too, all are where they wait.
    """
    experts = Experts(models, device, offload)
    try:
        with experts.place:
            yield experts
    finally:
        for stream in filter(None, map(_stream_of, models)):
            # Of a walk that ended before the turn for which it was prepared.
            stream.let_go()


def _stream_of(module: nn.Module) -> BlockStream | None:
    return getattr(module, "block_stream", None)


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still get on a CUDA device, its own unused cache included, under its limit."""
    # What torch has reserved and not given out counts as taken on the device, and is this process's to use.
    allocated = torch.cuda.memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    limit = int(torch.cuda.get_per_process_memory_fraction(device.index) * total)
    return min(free + torch.cuda.memory_reserved(device) - allocated, limit - allocated)


def is_crowded(device: torch.device, weights: int) -> bool:
    """Whether so many bytes of weights leave a GPU too little room to work in, so that idle models should move out."""
    if device.type != "cuda":
        return False
    return crowds(weights, torch.cuda.get_device_properties(device).total_memory)


def crowds(weights: int, total: int) -> bool:
    """Whether so many bytes of weights are too many for a GPU of `total` bytes."""
    return weights > WEIGHT_SHARE * total


def has_room_for(tokens: int, width: int, ffn_dim: int, itemsize: int, device: torch.device) -> bool:
    """Whether a forward of so many tokens is so small beside a GPU that a larger one fills it better."""
    if device.type != "cuda":
        return False
    return working_bytes(tokens, width, ffn_dim, itemsize) < free_bytes(device) // 8


def working_bytes(tokens: int, width: int, ffn_dim: int, itemsize: int) -> int:
    """What a forward of so many tokens needs beside the weights."""
    return tokens * (width * HIDDEN_COPIES * 4 + ffn_dim * 2 * itemsize)
