"""A block of a model as one piece of memory: which of its plain tensors lies where in it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from wan.memory.estimates import ALIGNMENT


class Leaf(NamedTuple):
    """A plain tensor of a block: attribute `name` of `owner`, at a place in the block's piece of memory."""

    owner: Tensor
    name: str
    start: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def view(self, memory: Tensor) -> Tensor:
        """The tensor in a piece of memory (bytes,) uint8."""
        # Tensors without gaps need no more bytes than their numbers, in whatever order of axes the strides say.
        count = self.shape.numel()
        return (
            memory[self.start : self.start + count * self.dtype.itemsize]
            .view(self.dtype)
            .as_strided(self.shape, self.stride)
        )

    def put(self, memory: Tensor) -> None:
        setattr(self.owner, self.name, self.view(memory))


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Its parameters and buffers."""
    return chain(module.parameters(), module.buffers())


def leaves_of(block: nn.Module) -> list[Leaf]:
    """The plain tensors of a block, one behind the other."""
    leaves, start = [], 0
    for owner, name in chain.from_iterable(_plain(tensor, "data") for tensor in tensors_of(block)):
        tensor = getattr(owner, name)
        leaves.append(Leaf(owner, name, start, tensor.dtype, tensor.shape, tensor.stride()))
        start += -(-tensor.numel() * tensor.itemsize // ALIGNMENT) * ALIGNMENT
    return leaves


def _plain(tensor: Tensor, name: str) -> Iterator[tuple[Tensor, str]]:
    """Where the plain tensors are that a tensor, or one of torchao that wraps several, is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor, name
        return
    for inner in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, inner)
        if is_traceable_wrapper_subclass(part):
            yield from _plain(part, inner)
        else:
            yield tensor, inner


def bytes_of(leaves: list[Leaf]) -> int:
    """Of the piece that they lie in."""
    last = leaves[-1]
    return -(-(last.start + last.shape.numel() * last.dtype.itemsize) // ALIGNMENT) * ALIGNMENT
