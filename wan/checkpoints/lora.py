"""LoRA files: checked against the transformer, and merged into its weights, or put beside those that are packed."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from torch import Tensor, nn

from nabla import InputError
from wan.checkpoints.component import Component
from wan.checkpoints.file_errors import clear_errors, exists, read_json_object
from wan.checkpoints.lora_names import Contents, Layer, mismatch, scale_by_peft, understand
from wan.checkpoints.naming import TransformerNaming
from wan.checkpoints.tensor_files import weight_file
from wan.checkpoints.weights import WeightFiles
from wan.config.model_settings import LoraFile
from wan.files.formats import SAFETENSORS
from wan.files.plain_data import parse_json

log = logging.getLogger("wan")

# What diffusers' configurations, and peft's tensors, have before every name.
DIFFUSERS, PEFT = "transformer.", "base_model.model."
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Adapters beside packed weights are called file0, file1 and so on in the model.
NAME = "file"
FACTORS = ("A.weight", "B.weight")


@dataclass(frozen=True)
class Adapter:
    """A LoRA file that fits a transformer.

    factors, differences: by their names in diffusers' model; factors of layers, and what is added to a whole tensor
    scaling: of the product of a layer's factors, by the layer: alpha / rank, and 1 where the file has no alpha
    """

    file: LoraFile
    factors: Mapping[str, Tensor]
    differences: Mapping[str, Tensor]
    scaling: Mapping[str, float]

    @property
    def changes(self) -> set[str]:
        """The names in the model of the tensors that it changes."""
        return {*self.differences, *(f"{layer}.weight" for layer in self.scaling)}

    def describe(self) -> str:
        more = f" and {len(self.differences)} whole tensors" if self.differences else ""
        return f"{self.file.file} at {self.file.scale:g}, {len(self.scaling)} layers{more}"


def read_lora(file: LoraFile, model: nn.Module, naming: TransformerNaming) -> Adapter:
    """Read a LoRA in any trainer's names, see `wan.checkpoints.lora_names`, for a transformer on the meta device.

    Raises `InputError` for a file that is not there, is damaged or is not safetensors, and for one of which nothing,
    or not all, fits the transformer.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError("lora needs peft, which is not installed; pip install peft")
    path = weight_file("lora", file.file, (SAFETENSORS,))
    tensors = _read(path)
    contents = understand(path, list(tensors), model, naming)
    if contents.unknown or not tensors:
        raise mismatch(path, len(tensors), contents.unknown, naming)
    return _adapter(file, path, tensors, contents, model.state_dict())


def _adapter(
    file: LoraFile, path: Path, tensors: Mapping[str, Tensor], contents: Contents, state: Mapping[str, Tensor]
) -> Adapter:
    """What a file holds, each tensor checked against the one of the model that it changes."""
    differences = {target: tensors[name] for target, name in contents.differences.items()}
    for target, difference in differences.items():
        _check_shape(path, target, difference.shape, state)
    config = _config(path, tensors)
    factors: dict[str, Tensor] = {}
    scaling: dict[str, float] = {}
    for target, layer in sorted(contents.layers.items()):
        # Layers that lack one are among the unknown.
        assert layer.down is not None and layer.up is not None
        down, up = tensors[layer.down], tensors[layer.up]
        _check_shape(path, f"{target}.weight", _product_shape(down, up), state)
        scale = _scale(path, layer, tensors, config, target, len(down))
        if layer.bias is not None:
            _check_shape(path, f"{target}.bias", tensors[layer.bias].shape, state)
            _accumulate(differences, f"{target}.bias", scale * tensors[layer.bias])
        if down.ndim == 2 and up.ndim == 2:
            scaling[target] = scale
            factors |= {f"{target}.lora_{kind}": factor for kind, factor in zip(FACTORS, (down, up))}
        else:
            # Only linear layers keep factors. (out, rank) @ (rank, in * places) is the whole tensor (out, in, *places).
            # Of a convolution, whose second factor takes one place at a time.
            product = (up.flatten(1) @ down.flatten(1)).reshape(state[f"{target}.weight"].shape)
            _accumulate(differences, f"{target}.weight", scale * product)
    return Adapter(file, factors, differences, scaling)


def _read(path: Path) -> dict[str, Tensor]:
    """A file's tensors in float32, in which scaling rounds nothing."""
    tensors = {}
    for name, tensor in WeightFiles([path]):
        # An alpha is one number, for which integers do as well.
        if not tensor.is_floating_point() and not name.endswith(".alpha"):
            raise InputError(f"lora {path}: {name!r} is {tensor.dtype}; use a file in float32, bfloat16 or float16")
        tensors[name] = tensor.float()
        if not tensors[name].isfinite().all():
            raise InputError(f"lora {path}: {name!r} has values that are not finite; use a file without such")
    return tensors


def _accumulate(differences: dict[str, Tensor], name: str, difference: Tensor) -> None:
    differences[name] = differences[name] + difference if name in differences else difference


def _scale(
    path: Path,
    layer: Layer,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    target: str,
    rank: int,
) -> float:
    """What the product of a layer's factors is multiplied by, as the file's alpha or its configuration says."""
    by_config = None if config is None else scale_by_peft(path, config, target, rank)
    if layer.alpha is None:
        return 1.0 if by_config is None else by_config
    alpha = tensors[layer.alpha]
    if alpha.numel() != 1:
        raise InputError(f"lora {path}: {layer.alpha!r} is {tuple(alpha.shape)}, but an alpha must be one number")
    by_file = alpha.item() / rank
    if by_config is not None and abs(by_config - by_file) > 1e-3 * abs(by_file):
        raise InputError(
            f"lora {path}: {layer.alpha!r} makes a scale of {by_file:g}, and its configuration of {by_config:g}; "
            "remove one of them"
        )
    return by_file


def merging(adapters: Sequence[Adapter], device: torch.device | str) -> Callable[[str, Tensor], Tensor]:
    """A function from a name and tensor of the transformer to the tensor with all adapters merged into it.

    It computes on `device`, in float32 or more.
    """

    def merge(name: str, tensor: Tensor) -> Tensor:
        # Adapters are float32 and promote what they are added to, so that `Component.load` rounds the sum once.
        layer, _, kind = name.rpartition(".")
        for adapter in adapters:
            scale = adapter.file.scale
            if name in adapter.differences:
                tensor = tensor.to(device) + scale * adapter.differences[name].to(device)
            if kind == "weight" and layer in adapter.scaling:
                down, up = (adapter.factors[f"{layer}.lora_{factor}"].to(device) for factor in FACTORS)
                tensor = tensor.to(device) + scale * adapter.scaling[layer] * (up @ down)
        return tensor

    return merge


@torch.no_grad()
def merge_anew(model: nn.Module, component: Component, adapters: Sequence[Adapter], names: Container[str]) -> None:
    """Merge adapters into tensors of some names as the files hold them, in place in a model that is loaded.

    If the names are those that the adapters change and those that earlier ones did, the model is to the bit as if it
    had been loaded with these adapters; `takes_merges` says whether it can be.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in component.tensors():
        if name in names:
            # Where it was merged when the model was loaded: another device would round otherwise.
            parameters[name].copy_(merging(adapters, parameters[name].device)(name, tensor))


def takes_merges(model: nn.Module, names: Set[str]) -> bool:
    """Whether tensors of a loaded model are whole and plain numbers, neither packed nor a process's part of them."""
    parameters = dict(model.named_parameters())
    plain = {name for name, one in parameters.items() if type(one) is nn.Parameter and type(one.data) is Tensor}
    return names <= plain


@torch.no_grad()
def attach(model: Any, adapters: Sequence[Adapter], dtype: torch.dtype) -> None:
    """Put adapters beside the weights of a transformer that cannot take them in, because they are packed, in place."""
    names = []
    for number, adapter in enumerate(adapters):
        for name, difference in adapter.differences.items():
            _add(model, name, adapter.file.scale * difference, adapter.file.file)
        if adapter.factors:
            name = f"{NAME}{number}"
            _inject(model, name, {key: factor.to(dtype) for key, factor in adapter.factors.items()})
            names.append((name, adapter))
    if names:
        model.set_adapters([name for name, _ in names])
    for name, adapter in names:
        for layer, scale in adapter.scaling.items():
            # peft would derive it from one alpha and a rank, and a file has its own for each layer.
            model.get_submodule(layer).scaling[name] = adapter.file.scale * scale
    model.requires_grad_(False)


def _add(model: nn.Module, name: str, difference: Tensor, file: str) -> None:
    path, _, kind = name.rpartition(".")
    module = model.get_submodule(path)
    # An earlier adapter may have put peft's layer around this one.
    parameter = getattr(getattr(module, "base_layer", module), kind)
    if not parameter.is_floating_point():
        raise InputError(f"lora {file} changes the whole of {name}, which is packed; use it with safetensors")
    parameter += difference.to(parameter)


def _inject(model: Any, name: str, factors: Mapping[str, Tensor]) -> None:
    """Put peft's layers around those that have factors, as an adapter of this name."""
    with warnings.catch_warnings():
        # Several adapters are meant.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        # Names are the model's own, without a prefix; peft assigns the factors, and draws no random ones before.
        model.load_lora_adapter(dict(factors), prefix=None, adapter_name=name, low_cpu_mem_usage=True)


def _product_shape(down: Tensor, up: Tensor) -> tuple[int, ...]:
    """The shape of the weights that two factors make; if they do not fit each other, one that no weights have.

    down: (rank, in, *places), up: (out, rank), for a convolution with axes of size 1 behind
    """
    fits = down.ndim == up.ndim >= 2 and 0 < len(down) == up.shape[1] and set(up.shape[2:]) <= {1}
    return (len(up), *down.shape[1:]) if fits else (*up.shape, *down.shape)


def _check_shape(path: Path, name: str, shape: Sequence[int], state: Mapping[str, Tensor]) -> None:
    wanted, shape = tuple(state[name].shape), tuple(shape)
    if shape != wanted:
        raise InputError(
            f"lora {path} is for a {name} of {shape}, and here it is {wanted}; "
            "use one made for a transformer of this size"
        )


def _config(path: Path, names: Iterable[str]) -> dict[str, Any] | None:
    """The `LoraConfig` that diffusers saves in a LoRA, or peft beside it."""
    with clear_errors(path), safe_open(path, framework="pt") as opened:
        text = (opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    if text is not None:
        try:
            config = parse_json(text)
        except ValueError as error:
            raise InputError(f"lora {path}: {LORA_ADAPTER_METADATA_KEY} in its header is no JSON ({error})") from None
        if not isinstance(config, dict):
            raise InputError(f"lora {path}: {LORA_ADAPTER_METADATA_KEY} in its header is no JSON object")
        return {key.removeprefix(DIFFUSERS): value for key, value in config.items()}
    beside = path.with_name(PEFT_CONFIG)
    if path.name == PEFT_FILE and exists(beside):
        return read_json_object(beside, "save the adapter again")
    names = list(names)
    if any(name.startswith(PEFT) for name in names) and not any(name.endswith(".alpha") for name in names):
        log.warning(
            "warning: lora %s has no alpha (peft keeps it in %s); it is taken to be the rank", path, PEFT_CONFIG
        )
    return None
