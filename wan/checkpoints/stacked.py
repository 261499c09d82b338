"""Tensors that a file holds in one, stacked, and a model each for itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wan.checkpoints.file_errors import CheckpointError
from wan.checkpoints.weights import WeightFiles


class Stack(NamedTuple):
    """A tensor of files that is made of parts, one after the other in memory.

    whole: its shape; parts: what they are called; shape: that of each
    """

    whole: tuple[int, ...]
    parts: tuple[str, ...]
    shape: tuple[int, ...]

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The parts of a tensor."""
        return tensor.reshape(len(self.parts), *self.shape).unbind()

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensor of parts."""
        return torch.stack(list(tensors)).reshape(self.whole)


class StackedFiles(WeightFiles):
    """The tensors of files with the parts of some in their place.

    stacks: of tensors by their names in the files
    Raises `CheckpointError` for one that is of another shape.
    """

    def __init__(self, weights: WeightFiles, stacks: Mapping[str, Stack]):
        self.files, self.where = weights.files, weights.where
        self._weights, self._stacks = weights, stacks
        self.shapes = {name: shape for name, shape in weights.shapes.items() if name not in stacks}
        for name in weights.shapes.keys() & stacks.keys():
            shape, stack = weights.shapes[name], stacks[name]
            if shape != stack.whole:
                raise CheckpointError(f"{self.where}: tensor {name!r} is {shape}, but must be {stack.whole}")
            self.shapes |= dict.fromkeys(stack.parts, stack.shape)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._weights:
            if name in self._stacks:
                yield from zip(self._stacks[name].parts, self._stacks[name].split(tensor))
            else:
                yield name, tensor


def join_parts(tensors: Mapping[str, Tensor], stacks: Mapping[str, Stack]) -> dict[str, Tensor]:
    """Tensors as files hold them: parts put together again, the others as they are."""
    parts = {part for stack in stacks.values() for part in stack.parts}
    joined = {name: stack.join([tensors[part] for part in stack.parts]) for name, stack in stacks.items()}
    return joined | {name: tensor for name, tensor in tensors.items() if name not in parts}
