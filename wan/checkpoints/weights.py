"""The tensors of one model's files, sharded or not, by name; none is read before it is asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan.checkpoints.file_errors import CheckpointError, clear_errors, exists, read_json_object, require_file
from wan.checkpoints.tensor_files import open_tensors
from wan.files.formats import SAFETENSORS


class WeightFiles:
    """The tensors of a component's files, by name; shapes are known without reading data, data is read one at a time.

    where: what a message says that they are in
    """

    def __init__(self, files: list[Path]):
        self.files = files
        self.where = files[0].parent
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with open_tensors(file) as (shapes, _):
                if twice := sorted(shapes.keys() & self.shapes.keys()):
                    raise CheckpointError(f"{file} holds tensor {twice[0]!r}, which another of the files holds too")
                self.shapes |= shapes

    @classmethod
    def find(cls, folder: Path, stem: str) -> WeightFiles:
        """The safetensors of a folder whose names start with `stem`: as the index lists them, or a single file."""
        index = folder / f"{stem}.safetensors.index.json"
        if exists(index):
            listed = read_json_object(index).get("weight_map")
            named: list[Any] = list(listed.values()) if isinstance(listed, dict) else [None]
            # A name with a folder in it could lead anywhere on the disk.
            if not all(isinstance(name, str) and Path(name).name == name for name in named):
                raise CheckpointError(f"{index} does not say which file holds which tensor; download it again")
            names = sorted(set(named))
        else:
            with clear_errors(folder):
                found = sorted(os.listdir(folder)) if exists(folder) else []
            names = [name for name in found if name.startswith(stem) and name.endswith(SAFETENSORS)]
            # Others beside it, such as `stem.fp16.safetensors`, are the same tensors in another type.
            if len(names) > 1 and f"{stem}.safetensors" in names:
                names = [f"{stem}.safetensors"]
        if not names:
            raise CheckpointError(f"{folder} has no {stem}*.safetensors; the checkpoint is incomplete")
        for name in names:
            require_file(folder / name)
        return cls([folder / name for name in names])

    def leave_out(self, is_not_needed: Callable[[str], bool]) -> None:
        """Forget tensors that the files hold for others."""
        self.shapes = {name: shape for name, shape in self.shapes.items() if not is_not_needed(name)}

    def bytes(self, dtype: torch.dtype) -> int:
        """Memory that they take in a dtype."""
        return sum(map(math.prod, self.shapes.values())) * dtype.itemsize

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for file in self.files:
            # One file is open at a time, so that no more than one is mapped.
            with open_tensors(file) as (shapes, read):
                for name in shapes:
                    if name in self.shapes:
                        yield name, read(name)
