"""GGUF: a transformer whose weights are quantised block by block, in many ways, and stay so while it runs."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from diffusers import GGUFQuantizationConfig
from torch import Tensor, nn

from nabla import InputError
from wan.checkpoints.component import Component
from wan.checkpoints.file_errors import CheckpointError, clear_errors
from wan.checkpoints.gguf_header import check_gguf
from wan.checkpoints.naming import TransformerNaming
from wan.checkpoints.weights import WeightFiles

if TYPE_CHECKING:
    from gguf.gguf_reader import ReaderTensor


class GgufFile(WeightFiles):
    """A GGUF file; its weights stay as they are packed, so that diffusers has to load them, by `load_gguf`."""

    def __init__(self, file: Path, naming: TransformerNaming):
        if importlib.util.find_spec("gguf") is None:
            raise InputError(f"transformer {file} needs gguf; pip install -r requirements-gguf.txt")
        from gguf import GGMLQuantizationType, GGUFReader

        with clear_errors(file):
            # First, since the library allocates and loops by whatever counts the header has.
            check_gguf(file)
            tensors = GGUFReader(file).tensors
        # Without the constructor of `WeightFiles`, which would open the file as safetensors or as a pickle.
        self.files, self.where, self.naming = [file], file, naming
        self._check_types(tensors)
        # Their axes are listed from the innermost.
        self.shapes = {naming.published_of(t.name): tuple(map(int, reversed(t.shape))) for t in tensors}
        if len(self.shapes) != len(tensors):
            raise CheckpointError(f"{file} holds a tensor under another name again; it cannot be read")
        self.shapes |= {name: self._patch_shape(name) for name in self.shapes if _is_patch(name, naming)}
        # What stays packed, unless diffusers has a type for it.
        plain = GGMLQuantizationType.F32, GGMLQuantizationType.F16
        self.packed = {naming.published_of(t.name): int(t.n_bytes) for t in tensors if t.tensor_type not in plain}
        self.packed_bytes = sum(int(tensor.n_bytes) for tensor in tensors)

    def _check_types(self, tensors: Sequence[ReaderTensor]) -> None:
        from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES
        from gguf import GGMLQuantizationType

        # diffusers lists what it unpacks; float32 and float16 it takes as tensors of torch.
        read = {*map(int, SUPPORTED_GGUF_QUANT_TYPES), *(GGMLQuantizationType[name] for name in ("F32", "F16", "BF16"))}
        for tensor in tensors:
            if tensor.tensor_type not in read:
                known = ", ".join(sorted(GGMLQuantizationType(kind).name for kind in read))
                raise CheckpointError(
                    f"{self.where}: tensor {tensor.name!r} is {tensor.tensor_type.name}, which is not read; "
                    f"use a file of {known}"
                )

    def _patch_shape(self, name: str) -> tuple[int, ...]:
        """The five axes of the weights of a patch, which GGUF, having four at most, may hold folded into fewer."""
        shape, patch = self.shapes[name], self.naming.patch
        if len(shape) == 5:
            return shape
        width = self.shapes.get(f"{name.removesuffix('.weight')}.bias", (0,))[0]
        # Numbers to an output channel: of all input channels and all places of a patch.
        per_row = math.prod(shape) // width if width else 0
        channels = per_row // math.prod(patch)
        if not width or math.prod(shape) != width * channels * math.prod(patch) or not channels:
            raise CheckpointError(
                f"{self.where}: {name} is {shape}, which is not the weights of a patch of {patch}; use another file"
            )
        return (width, channels, *patch)

    def bytes(self, dtype: torch.dtype) -> int:
        return self.packed_bytes

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        raise CheckpointError(f"{self.where} is packed; it can be run, but not be read as tensors")


def check_packed(component: Component, fp8: bool = False, dit_fsdp: bool = False) -> bool:
    """Whether a component's weights are those of GGUF; raises `InputError` for what does not go with them."""
    packed = isinstance(component.weights, GgufFile)
    if packed and (fp8 or dit_fsdp):
        raise InputError(
            "weights of GGUF are packed, which goes neither with fp8 nor with dit_fsdp; leave them out (--fp8 false)"
        )
    return packed


def load_gguf(component: Component, dtype: torch.dtype, device: torch.device | str) -> Any:
    """The transformer of a `GgufFile`, its linear layers unpacking their weights to `dtype` whenever they run."""
    from diffusers.models.model_loading_utils import load_gguf_checkpoint

    assert isinstance(component.weights, GgufFile)
    file, naming = component.weights.where, component.weights.naming
    empty: Any = component.model
    with TemporaryDirectory() as folder:
        # diffusers reads the sizes from a folder alone.
        empty.save_config(folder)
        try:
            stored = load_gguf_checkpoint(str(file))
            _unfold_patches(stored, naming, component.weights.shapes)
            model = type(empty).from_single_file(
                # With exactly the model's own names diffusers leaves them alone. Its conversion from other names
                # would skip what it does not know with a warning only.
                {component.names[naming.published_of(name)]: tensor for name, tensor in stored.items()},
                config=folder,
                quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
                torch_dtype=dtype,
                device=device,
            )
        except ValueError as error:
            raise CheckpointError(f"{file} cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    _unpack_all_but_layers(model, dtype)
    return model.requires_grad_(False).eval()


def _unpack_all_but_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Unpack what a file packs beside the weights of linear layers: diffusers would take their bytes for numbers."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, dequantize_gguf_tensor

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, GGUFParameter) and not (isinstance(module, GGUFLinear) and name == "weight"):
                setattr(module, name, nn.Parameter(dequantize_gguf_tensor(parameter).to(dtype)))


def _is_patch(name: str, naming: TransformerNaming) -> bool:
    """Whether a tensor, by its published name, is the weights of a patch: of the latents, or of what is beside them."""
    return name.endswith(naming.first_weight)


def _unfold_patches(
    stored: dict[str, Tensor], naming: TransformerNaming, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Give the weights of patches their five axes, in place; folded axes lie in the same order."""
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

    for name, weights in stored.items():
        published = naming.published_of(name)
        if _is_patch(published, naming):
            plain = dequantize_gguf_tensor(weights) if isinstance(weights, GGUFParameter) else weights
            stored[name] = torch.as_tensor(plain).reshape(shapes[published])
