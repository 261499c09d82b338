"""A transformer as one file, as they are passed around: safetensors, float8 with scales among them, and GGUF.

Tensors may have their published or diffusers' names; here they always have the published ones, so that a checkpoint's
own code takes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from wan.checkpoints.file_errors import CheckpointError
from wan.checkpoints.gguf_file import GgufFile
from wan.checkpoints.naming import TransformerNaming
from wan.checkpoints.quantization_marks import MARKER, NOT_NEEDED, SCALES, USE_INSTEAD, check_marker, check_name
from wan.checkpoints.tensor_files import open_tensors, stored_types, weight_file
from wan.checkpoints.weights import WeightFiles
from wan.files.formats import GGUF, SAFETENSORS

FLOAT8 = ("F8_E4M3", "F8_E5M2")
FLOATS = ("F64", "F32", "F16", "BF16")


def open_transformer(name: str | Path, naming: TransformerNaming) -> WeightFiles:
    """The tensors of a file of a family's transformer by their published names; no data is read.

    Raises `InputError` for a file that is not there or of a kind that is not read, and for GGUF without its library;
    `CheckpointError` for one that is damaged or holds something else.
    """
    file = weight_file("transformer", name, (SAFETENSORS, GGUF))
    weights = GgufFile(file, naming) if file.suffix == GGUF else ScaledFile(file, naming)
    if naming.first_weight not in weights.shapes:
        raise CheckpointError(
            f"{file} is not a transformer of {naming.family}: it has no {naming.first_weight}; give the file of one, "
            "and a LoRA as --lora"
        )
    return weights


class ScaledFile(WeightFiles):
    """A safetensors file, the weights of which may be float8 and have a scale, of all or of each row, beside them."""

    def __init__(self, file: Path, naming: TransformerNaming):
        super().__init__([file])
        self.where = file
        self.stored: dict[str, str] = {}
        self.scales: dict[str, str] = {}
        lost = []
        for name in self.shapes:
            layer, _, last = name.rpartition(".")
            if last in SCALES:
                to, key = self.scales, naming.published_of(f"{layer}.weight")
            elif last in NOT_NEEDED or last == MARKER:
                continue
            else:
                check_name(file, name)
                to, key = self.stored, naming.published_of(name)
            # The published and diffusers' name of one tensor may both stand in a file.
            lost += [name] if key in to else []
            to[key] = name
        if lost:
            raise CheckpointError(f"{file} holds {min(lost)!r} under another name again; it cannot be read")
        if idle := self.scales.keys() - self.stored.keys():
            raise CheckpointError(f"{file} has a scale for {min(idle)!r}, which is missing; download it again")
        self._check_types_and_scales()
        # By published names, without the scales; the checks above need the file's own.
        self.shapes = {name: self.shapes[stored] for name, stored in self.stored.items()}

    def _check_types_and_scales(self) -> None:
        """Raise `CheckpointError` for what is no plain number, nor float8 that a scale alone makes one."""
        file, types = self.files[0], stored_types(self.files[0])
        markers = [name for name in self.shapes if name.rpartition(".")[2] == MARKER]
        with open_tensors(file) as (_, read):
            for name in markers:
                if types[name] != "U8" or len(self.shapes[name]) != 1:
                    raise CheckpointError(f"{file}: {name!r} is no text in bytes, as a mark of quantisation must be")
                check_marker(file, name, bytes(read(name).tolist()))
        for name in self.stored.values():
            if types[name] not in (*FLOATS, *FLOAT8):
                raise CheckpointError(
                    f"{file} is quantised in a way that is not read: {name!r} is stored as {types[name]}; {USE_INSTEAD}"
                )
        for name, scale in self.scales.items():
            shape, weight = self.shapes[scale], self.shapes[self.stored[name]]
            # (rows,) or (rows, 1, ...) beside a weight (rows, ...).
            one_a_row = bool(shape) and bool(weight) and shape[0] == weight[0] and set(shape[1:]) <= {1}
            if types[scale] not in FLOATS or not (math.prod(shape) == 1 or one_a_row):
                raise CheckpointError(
                    f"{file}: a scale is {shape}; only one, or one a row, is read ({scale!r} of {types[scale]})"
                )

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        types = stored_types(self.files[0])
        with open_tensors(self.files[0]) as (_, read):
            for name, stored in self.stored.items():
                tensor = read(stored)
                # Float32 holds each float8 exactly, and `Component.load` rounds its product with the scale once.
                tensor = tensor.float() if types[stored] in FLOAT8 else tensor
                if name in self.scales:
                    scale = read(self.scales[name])
                    tensor = tensor.float() * scale.float().reshape(-1, *[1] * (tensor.ndim - 1))
                yield name, tensor
