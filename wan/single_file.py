"""A transformer as one file, as they are passed around: safetensors, float8 with scales among them, and GGUF.

Tensors may have Wan's or diffusers' names; here they always have Wan's, so that a checkpoint's own code takes them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import GGUFQuantizationConfig, WanTransformer3DModel
from torch import Tensor, nn

from nabla import InputError
from wan import names
from wan.weights import SAFETENSORS, CheckpointError, Part, WeightFiles, damage, open_tensors, weight_file

GGUF = ".gguf"
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("scale_weight", "weight_scale")
# Of products in float8, and marks of the format.
NOT_NEEDED = ("scale_input", "input_scale", "scaled_fp8", "comfy_quant")
FIRST = "patch_embedding.weight"


def open_transformer(name: str | Path) -> WeightFiles:
    """The tensors of a transformer's file by their published names; no data is read.

    Raises `InputError` for a file that is not there or of a kind that is not read, and for GGUF without its library;
    `CheckpointError` for one that is damaged or holds something else.
    """
    file = weight_file("transformer", name, (SAFETENSORS, GGUF))
    weights = GgufFile(file) if file.suffix == GGUF else ScaledFile(file)
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
        for name in self.shapes:
            layer, _, last = name.rpartition(".")
            if last in SCALES:
                self.scales[_published(f"{layer}.weight")] = name
            elif last not in NOT_NEEDED:
                self.stored[_published(name)] = name
        lost = set(self.shapes) - {*self.stored.values(), *self.scales.values()}
        if strange := [name for name in lost if name.rpartition(".")[2] not in NOT_NEEDED]:
            raise CheckpointError(f"{file} holds {min(strange)!r} under another name again; it cannot be read")
        if idle := self.scales.keys() - self.stored.keys():
            raise CheckpointError(f"{file} has a scale for {min(idle)!r}, which is missing; download it again")
        self.shapes = {name: self.shapes[stored] for name, stored in self.stored.items()}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        with open_tensors(self.files[0]) as (_, read):
            for name, stored in self.stored.items():
                tensor = read(stored)
                tensor = tensor.float() if tensor.dtype in FLOAT8 else tensor
                if name in self.scales:
                    tensor = self._scaled(tensor, read(self.scales[name]))
                yield name, tensor

    def _scaled(self, tensor: Tensor, scale: Tensor) -> Tensor:
        if scale.numel() not in (1, len(tensor)):
            raise CheckpointError(f"{self.where}: a scale is {tuple(scale.shape)}; only one, or one a row, is read")
        return tensor.float() * scale.float().reshape(-1, *[1] * (tensor.ndim - 1))


class GgufFile(WeightFiles):
    """A GGUF file; its weights stay as they are packed, so that diffusers has to load them, by `load_gguf`."""

    def __init__(self, file: Path):
        if importlib.util.find_spec("gguf") is None:
            raise InputError(f"transformer {file} needs gguf; pip install -r requirements-gguf.txt")
        from gguf import GGMLQuantizationType, GGUFReader

        with damage(file):
            tensors = GGUFReader(file).tensors
        self.files, self.where = [file], file
        # Their axes are listed from the innermost.
        self.shapes = {_published(t.name): tuple(map(int, reversed(t.shape))) for t in tensors}
        # What stays packed, unless diffusers has a type for it.
        plain = GGMLQuantizationType.F32, GGMLQuantizationType.F16
        self.packed = {_published(t.name): int(t.n_bytes) for t in tensors if t.tensor_type not in plain}
        self.packed_bytes = sum(int(tensor.n_bytes) for tensor in tensors)

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


def _published(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return names.published(name, names.TRANSFORMER)
