"""Weight files into models: strict, one tensor at a time, in the wanted dtype and on the wanted device."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nabla import InputError
from wan.checkpoints.file_errors import CheckpointError, clear_errors, exists, read_json, require_file
from wan.checkpoints.quantization_marks import check_header
from wan.files.formats import SAFETENSORS

__all__ = ["CheckpointError", "Part", "WeightFiles", "check_names", "open_tensors", "read_json", "weight_file"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Of safetensors, in its names: what a tensor may be for its values to be what they say.
STORED = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "I64",
    "I32",
    "I16",
    "I8",
    "U64",
    "U32",
    "U16",
    "U8",
    "BOOL",
)


class WeightFiles:
    """The tensors of a part's files, by name; shapes are known without reading data, data is read one at a time.

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
            listed = read_json(index).get("weight_map")
            named: list[Any] = list(listed.values()) if isinstance(listed, dict) else [None]
            if not all(isinstance(name, str) and Path(name).name == name for name in named):
                raise CheckpointError(f"{index} does not say which file holds which tensor; download it again")
            names = sorted(set(named))
        else:
            with clear_errors(folder):
                found = sorted(os.listdir(folder)) if exists(folder) else []
            names = [name for name in found if name.startswith(stem) and name.endswith(SAFETENSORS)]
            if len(names) > 1 and f"{stem}.safetensors" in names:
                names = [f"{stem}.safetensors"]
        if not names:
            raise CheckpointError(f"{folder} has no {stem}*.safetensors; the checkpoint is incomplete")
        for name in names:
            require_file(folder / name)
        return cls([folder / name for name in names])

    def bytes(self, dtype: torch.dtype) -> int:
        """Memory that they take in a dtype."""
        return sum(map(math.prod, self.shapes.values())) * dtype.itemsize

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for file in self.files:
            with open_tensors(file) as (shapes, read):
                for name in shapes:
                    yield name, read(name)


@dataclass(frozen=True)
class Part:
    """A model on the meta device and the files that hold its tensors; made only if these fit, before data is read.

    names: tensor name in the files -> name in the model, all of them
    float32: modules or parameters by name that stay in float32 whatever the dtype
    Raises `CheckpointError` naming the first tensor that is missing, extra or of another shape.
    """

    model: nn.Module
    weights: WeightFiles
    names: Mapping[str, str]
    float32: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        expected = self.model.state_dict()
        check_names(self.weights, {name: tuple(expected[own].shape) for name, own in self.names.items()})

    def bytes(self, dtype: torch.dtype) -> int:
        """Memory that the weights take in a dtype."""
        return self.weights.bytes(dtype)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors as they are stored, by their names in the model, one at a time."""
        for name, tensor in self.weights:
            if tensor.dtype not in DTYPES:
                raise CheckpointError(f"tensor {name!r} is {tensor.dtype}; only float32, bfloat16 or float16 is read")
            yield self.names[name], tensor

    def load(
        self,
        dtype: torch.dtype,
        device: torch.device | str,
        shard: Callable[[nn.Module], None] | None = None,
        change: Callable[[str, Tensor], Tensor] | None = None,
        quantize: Callable[[str, Tensor], Tensor] | None = None,
    ) -> nn.Module:
        """Read the weights into the model; needs no more memory than the result and one tensor.

        shard: spreads the parameters of the model, on the meta device still, over processes; each reads its own parts
        change: from a tensor as it is stored, and its name in the model, to the one to use
        quantize: from that one in its final type to the one that the model gets, see `wan.quantize.quantizer`
        """
        if shard is not None:
            for name, parameter in self.model.requires_grad_(False).named_parameters():
                parameter.data = parameter.to(self._dtype_of(name, dtype))
            shard(self.model)
        sharded = dict(self.model.named_parameters())
        state = {}
        for own, tensor in self.tensors():
            tensor = tensor if change is None else change(own, tensor)
            whole = sharded.get(own)
            if isinstance(whole, DTensor):
                tensor = _own_rows(tensor, whole)
            # A tensor kept as read would pin its whole file in memory.
            tensor = tensor.to(device=device, dtype=self._dtype_of(own, dtype), copy=True)
            if isinstance(whole, DTensor):
                form = {"shape": whole.shape, "stride": whole.stride()}
                tensor = DTensor.from_local(tensor, whole.device_mesh, whole.placements, run_check=False, **form)
            state[own] = tensor if quantize is None else quantize(own, tensor)
        # Tied tensors stand once in the files.
        missing, _ = self.model.load_state_dict(state, strict=False, assign=True)
        if missing:
            tie_weights: Any = self.model.tie_weights
            tie_weights()
        return self.model.requires_grad_(False).eval()

    def _dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if set(name.split(".")) & set(self.float32) else dtype


def _own_rows(tensor: Tensor, whole: DTensor) -> Tensor:
    """The rows of a tensor that this process holds of `whole`, which is sharded by rows as torch.chunk cuts them."""
    rows = -(-len(tensor) // whole.device_mesh.size())
    first = rows * whole.device_mesh.get_local_rank()
    return tensor[first : first + rows]


def check_names(weights: WeightFiles, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `CheckpointError` unless the files hold exactly the expected tensors."""
    where = weights.where
    missing, extra = sorted(expected.keys() - weights.shapes.keys()), sorted(weights.shapes.keys() - expected.keys())
    if missing:
        raise CheckpointError(f"{where}: tensor {missing[0]!r} is missing{_more(missing)}; download it again")
    if extra:
        raise CheckpointError(f"{where}: tensor {extra[0]!r} does not belong to this model{_more(extra)}")
    for name, shape in expected.items():
        if 0 in shape:
            raise CheckpointError(f"{where}: tensor {name!r} is {shape}, which holds nothing; download it again")
        if weights.shapes[name] != shape:
            raise CheckpointError(f"{where}: tensor {name!r} is {weights.shapes[name]}, but must be {shape}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def weight_file(name: str, file: str | Path, endings: tuple[str, ...]) -> Path:
    """The path of a file of weights; raises `InputError` unless it is there and ends as it must, so in no pickle."""
    path = Path(file)
    if exists(path) and path.is_dir():
        raise InputError(f"{name} {file} is a folder; give the {' or '.join(endings)} file itself")
    if path.suffix not in endings:
        raise InputError(
            f"{name} {file} must end in {' or '.join(endings)}; other formats can hold code and are not read"
        )
    if not exists(path):
        raise InputError(f"{name} {file} is not a file; check the path")
    require_file(path)
    return path


@contextmanager
def open_tensors(file: Path) -> Iterator[tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]]:
    """Shapes of a file's tensors and a function that reads one."""
    require_file(file)
    if file.suffix != SAFETENSORS:
        with clear_errors(file):
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
            _check_plain(file, tensors)
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        yield shapes, tensors.__getitem__
        return
    with clear_errors(file):
        opened = safe_open(file, framework="pt")
        check_header(file, opened.metadata() or {})
        views = {name: opened.get_slice(name) for name in opened.keys()}
        for name, view in views.items():
            if view.get_dtype() not in STORED:
                raise CheckpointError(
                    f"{file}: tensor {name!r} is stored as {view.get_dtype()}, which is not read; "
                    "use a file in bfloat16, float16, float32 or scaled float8"
                )
        shapes = {name: tuple(view.get_shape()) for name, view in views.items()}

    def read(name: str) -> Tensor:
        with clear_errors(file):
            return opened.get_tensor(name)

    yield shapes, read


def stored_types(file: Path) -> dict[str, str]:
    """Of a safetensors file that `open_tensors` takes: the type of each tensor, in the file's words."""
    with clear_errors(file), safe_open(file, framework="pt") as opened:
        return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}


def _check_plain(file: Path, tensors: object) -> None:
    """Raise `CheckpointError` for a pickle of anything but dense tensors by name."""
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise CheckpointError(f"{file} does not hold tensors by their names; use the published file")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{file}: {name!r} is no tensor; use the published file, of weights alone")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{file}: tensor {name!r} is sparse or quantised; only dense tensors are read")
        if tensor.device.type != "cpu":
            raise CheckpointError(f"{file}: tensor {name!r} has no data ({tensor.device}); use the published file")
