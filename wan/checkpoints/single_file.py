"""A transformer as one file, as they are passed around: safetensors, float8 with scales among them, and GGUF.

Tensors may have Wan's or diffusers' names; here they always have Wan's, so that a checkpoint's own code takes them.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from diffusers import GGUFQuantizationConfig, WanTransformer3DModel
from torch import Tensor, nn

from nabla import InputError
from wan.checkpoints import quantised as quantisation
from wan.checkpoints.gguf_header import check_gguf
from wan.checkpoints.reading import CheckpointError, damage
from wan.checkpoints.weights import Part, WeightFiles, open_tensors, stored_types, weight_file
from wan.config.geometry import DEFAULT_GEOMETRY
from wan.files.formats import SAFETENSORS
from wan.models.wan import names

if TYPE_CHECKING:
    from gguf.gguf_reader import ReaderTensor

GGUF = ".gguf"
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
FLOAT8 = ("F8_E4M3", "F8_E5M2")
FLOATS = ("F64", "F32", "F16", "BF16")
FIRST = "patch_embedding.weight"


def open_transformer(name: str | Path, patch: tuple[int, int, int] = DEFAULT_GEOMETRY.patch) -> WeightFiles:
    """The tensors of a transformer's file by their published names; no data is read.

    patch: (frames, rows, columns) of latents to one token
    Raises `InputError` for a file that is not there or of a kind that is not read, and for GGUF without its library;
    `CheckpointError` for one that is damaged or holds something else.
    """
    file = weight_file("transformer", name, (SAFETENSORS, GGUF))
    weights = GgufFile(file, patch) if file.suffix == GGUF else ScaledFile(file)
    if FIRST not in weights.shapes:
        raise CheckpointError(f"{file} is not a transformer of Wan2.1: it has no {FIRST}")
    return weights


class ScaledFile(WeightFiles):
    """A safetensors file, the weights of which may be float8 and have a scale, of all or of each row, beside them."""

    def __init__(self, file: Path):
        super().__init__([file])
        self.where = file
        self.stored: dict[str, str] = {}
        self.scales: dict[str, str] = {}
        lost = []
        for name in self.shapes:
            layer, _, last = name.rpartition(".")
            if last in quantisation.SCALES:
                to, key = self.scales, _published(f"{layer}.weight")
            elif last in quantisation.NOT_NEEDED or last == quantisation.MARKER:
                continue
            else:
                quantisation.check_name(file, name)
                to, key = self.stored, _published(name)
            lost += [name] if key in to else []
            to[key] = name
        if lost:
            raise CheckpointError(f"{file} holds {min(lost)!r} under another name again; it cannot be read")
        if idle := self.scales.keys() - self.stored.keys():
            raise CheckpointError(f"{file} has a scale for {min(idle)!r}, which is missing; download it again")
        self._check_quantisation()
        self.shapes = {name: self.shapes[stored] for name, stored in self.stored.items()}

    def _check_quantisation(self) -> None:
        """Raise `CheckpointError` for what is no plain number, nor float8 that a scale alone makes one."""
        file, types = self.files[0], stored_types(self.files[0])
        markers = [name for name in self.shapes if name.rpartition(".")[2] == quantisation.MARKER]
        with open_tensors(file) as (_, read):
            for name in markers:
                if types[name] != "U8" or len(self.shapes[name]) != 1:
                    raise CheckpointError(f"{file}: {name!r} is no text in bytes, as a mark of quantisation must be")
                quantisation.check_marker(file, name, bytes(read(name).tolist()))
        for name in self.stored.values():
            if types[name] not in (*FLOATS, *FLOAT8):
                raise CheckpointError(
                    f"{file} is quantised in a way that is not read: {name!r} is stored as {types[name]}; "
                    f"{quantisation.USE}"
                )
        for name, scale in self.scales.items():
            shape, weight = self.shapes[scale], self.shapes[self.stored[name]]
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
                tensor = tensor.float() if types[stored] in FLOAT8 else tensor
                if name in self.scales:
                    scale = read(self.scales[name])
                    tensor = tensor.float() * scale.float().reshape(-1, *[1] * (tensor.ndim - 1))
                yield name, tensor


class GgufFile(WeightFiles):
    """A GGUF file; its weights stay as they are packed, so that diffusers has to load them, by `load_gguf`."""

    def __init__(self, file: Path, patch: tuple[int, int, int]):
        if importlib.util.find_spec("gguf") is None:
            raise InputError(f"transformer {file} needs gguf; pip install -r requirements-gguf.txt")
        from gguf import GGMLQuantizationType, GGUFReader

        with damage(file):
            check_gguf(file)
            tensors = GGUFReader(file).tensors
        self.files, self.where = [file], file
        self._check_types(tensors)
        # Their axes are listed from the innermost.
        self.shapes = {_published(t.name): tuple(map(int, reversed(t.shape))) for t in tensors}
        if len(self.shapes) != len(tensors):
            raise CheckpointError(f"{file} holds a tensor under another name again; it cannot be read")
        if FIRST in self.shapes:
            self.shapes[FIRST] = self._patch_shape(self.shapes[FIRST], patch)
        # What stays packed, unless diffusers has a type for it.
        plain = GGMLQuantizationType.F32, GGMLQuantizationType.F16
        self.packed = {_published(t.name): int(t.n_bytes) for t in tensors if t.tensor_type not in plain}
        self.packed_bytes = sum(int(tensor.n_bytes) for tensor in tensors)

    def _check_types(self, tensors: Sequence[ReaderTensor]) -> None:
        from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES
        from gguf import GGMLQuantizationType

        read = {*map(int, SUPPORTED_GGUF_QUANT_TYPES), *(GGMLQuantizationType[name] for name in ("F32", "F16", "BF16"))}
        for tensor in tensors:
            if tensor.tensor_type not in read:
                known = ", ".join(sorted(GGMLQuantizationType(kind).name for kind in read))
                raise CheckpointError(
                    f"{self.where}: tensor {tensor.name!r} is {tensor.tensor_type.name}, which is not read; "
                    f"use a file of {known}"
                )

    def _patch_shape(self, shape: tuple[int, ...], patch: tuple[int, int, int]) -> tuple[int, ...]:
        """The five axes of the patch's weights, which GGUF, having four at most, may hold folded into fewer."""
        if len(shape) == 5:
            return shape
        width = self.shapes.get("patch_embedding.bias", (0,))[0]
        per_row = math.prod(shape) // width if width else 0
        channels = per_row // math.prod(patch)
        if not width or math.prod(shape) != width * channels * math.prod(patch) or not channels:
            raise CheckpointError(
                f"{self.where}: {FIRST} is {shape}, which is not the weights of a patch of {patch}; use another file"
            )
        return (width, channels, *patch)

    def bytes(self, dtype: torch.dtype) -> int:
        return self.packed_bytes

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        raise CheckpointError(f"{self.where} is packed; it can be run, but not be read as tensors")


def check_packed(part: Part, fp8: bool = False, dit_fsdp: bool = False) -> bool:
    """Whether a part's weights are those of GGUF; raises `InputError` for what does not go with them."""
    packed = isinstance(part.weights, GgufFile)
    if packed and (fp8 or dit_fsdp):
        raise InputError(
            "weights of GGUF are packed, which goes neither with fp8 nor with dit_fsdp; leave them out (--fp8 false)"
        )
    return packed


def load_gguf(part: Part, dtype: torch.dtype, device: torch.device | str) -> WanTransformer3DModel:
    """The transformer of a `GgufFile`, its linear layers unpacking their weights to `dtype` whenever they run."""
    from diffusers.models.model_loading_utils import load_gguf_checkpoint

    file = part.weights.where
    with TemporaryDirectory() as folder:
        part.model.save_config(folder)
        try:
            stored = load_gguf_checkpoint(str(file))
            _unfold_patch(stored, part.weights.shapes[FIRST])
            model = WanTransformer3DModel.from_single_file(
                {part.names[_published(name)]: tensor for name, tensor in stored.items()},
                config=folder,
                quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
                torch_dtype=dtype,
                device=device,
            )
        except ValueError as error:
            raise CheckpointError(f"{file} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    _unpack_all_but_layers(model, dtype)
    return model.requires_grad_(False).eval()


def _unpack_all_but_layers(model: WanTransformer3DModel, dtype: torch.dtype) -> None:
    """Unpack what a file packs beside the weights of linear layers: diffusers would take their bytes for numbers."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, dequantize_gguf_tensor

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, GGUFParameter) and not (isinstance(module, GGUFLinear) and name == "weight"):
                setattr(module, name, nn.Parameter(dequantize_gguf_tensor(parameter).to(dtype)))


def _unfold_patch(stored: dict[str, Tensor], shape: tuple[int, ...]) -> None:
    """Give the patch's weights their five axes, in place; folded axes lie in the same order."""
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

    name = next(name for name in stored if _published(name) == FIRST)
    weights = stored[name]
    if isinstance(weights, GGUFParameter):
        weights = dequantize_gguf_tensor(weights)
    stored[name] = torch.as_tensor(weights).reshape(shape)


def _published(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return names.published(name, names.TRANSFORMER)
