"""Weight files into models: strict, one tensor at a time, in the wanted dtype and on the wanted device."""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nabla import InputError


class CheckpointError(InputError):
    """A checkpoint that is missing, incomplete, damaged or of another kind."""


def read_json(path: Path) -> dict:
    """A JSON object from a file of a checkpoint."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; download the checkpoint again") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; download it again")
    return content


class WeightFiles:
    """The tensors of a part's files, by name; shapes are known without reading data, data is read one at a time."""

    def __init__(self, files: list[Path]):
        self.files = files
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            with _open(file) as (shapes, _):
                if twice := sorted(shapes.keys() & self.shapes.keys()):
                    raise CheckpointError(f"{file} holds tensor {twice[0]!r}, which another of the files holds too")
                self.shapes |= shapes

    @classmethod
    def find(cls, folder: Path, stem: str) -> WeightFiles:
        """The safetensors of a folder whose names start with `stem`: as the index lists them, or a single file."""
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
        else:
            names = sorted(path.name for path in folder.glob(f"{stem}*.safetensors"))
            if len(names) > 1 and f"{stem}.safetensors" in names:
                names = [f"{stem}.safetensors"]
        if not names:
            raise CheckpointError(f"{folder} has no {stem}*.safetensors; the checkpoint is incomplete")
        for name in names:
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name} is missing; download the checkpoint again")
        return cls([folder / name for name in names])

    @property
    def elements(self) -> int:
        """How many numbers the files hold."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for file in self.files:
            with _open(file) as (shapes, read):
                for name in shapes:
                    yield name, read(name)


def load(
    model: nn.Module,
    weights: WeightFiles,
    names: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device | str,
    float32: tuple[str, ...] = (),
    tie: Callable[[], object] | None = None,
) -> nn.Module:
    """Give a model built on the meta device its weights; needs no more memory than the result and one tensor.

    names: tensor name in the files -> name in the model, all of them
    float32: modules or parameters by name that stay in float32 whatever the dtype
    tie: gives the tensors that no file holds to the modules that share them
    Raises `CheckpointError` naming the first tensor that is missing, extra or of another shape.
    """
    expected = model.state_dict()
    check_names(weights, {file_name: tuple(expected[own].shape) for file_name, own in names.items()})
    state = {}
    for file_name, tensor in weights:
        own = names[file_name]
        wanted = torch.float32 if set(own.split(".")) & set(float32) else dtype
        # A tensor kept as read would pin its whole file in memory.
        state[own] = tensor.to(device=device, dtype=wanted, copy=True)
    model.load_state_dict(state, strict=tie is None, assign=True)
    if tie is not None:
        tie()
    return model.requires_grad_(False).eval()


def check_names(weights: WeightFiles, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `CheckpointError` unless the files hold exactly the expected tensors."""
    where = weights.files[0].parent
    missing, extra = sorted(expected.keys() - weights.shapes.keys()), sorted(weights.shapes.keys() - expected.keys())
    if missing:
        raise CheckpointError(f"{where}: tensor {missing[0]!r} is missing{_more(missing)}; download it again")
    if extra:
        raise CheckpointError(f"{where}: tensor {extra[0]!r} does not belong to this model{_more(extra)}")
    for name, shape in expected.items():
        if weights.shapes[name] != shape:
            raise CheckpointError(f"{where}: tensor {name!r} is {weights.shapes[name]}, but must be {shape}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


@contextmanager
def _open(file: Path) -> Iterator[tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]]:
    """Shapes of a file's tensors and a function that reads one."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; download the checkpoint again")
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                yield {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}, opened.get_tensor
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
            yield {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, OSError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{file} is truncated or corrupt ({reason}); download it again") from error
