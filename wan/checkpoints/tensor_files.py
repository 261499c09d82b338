"""One file of tensors, safetensors or a pickle of plain tensors: shapes by name, and a function that reads one."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from nabla import InputError
from wan.checkpoints.file_errors import CheckpointError, clear_errors, exists, require_file
from wan.checkpoints.quantization_marks import check_header
from wan.files.formats import SAFETENSORS

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
            # Runs no code, and needs no GPU for tensors that were saved on one. Torch cannot map its older format,
            # which is no zip.
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
            _check_plain(file, tensors)
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        yield shapes, tensors.__getitem__
        return
    with clear_errors(file):
        opened = safe_open(file, framework="pt")
        check_header(file, opened.metadata() or {})
        # A slice knows its type and shape from the header; no data is read.
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
