"""LoRA files: converted and scaled by diffusers and peft, checked against the transformer, merged into its weights."""

from __future__ import annotations

import copy
import importlib.util
import json
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from torch import Tensor, nn

from nabla import InputError
from wan import published
from wan.config import LoraFile
from wan.weights import SAFETENSORS, WeightFiles, damage, weight_file

DIFFUSERS, WAN, MUSUBI = "transformer.", "diffusion_model.", "lora_unet_"
NAME = "file"
FACTORS = ("A.weight", "B.weight")
PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight"))
KINDS = (*PAIRS[0], *PAIRS[1], "alpha")
# Files that were extracted from whole models hold differences beside factors: their endings, and the tensors changed.
DIFFERENCES = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}


@dataclass(frozen=True)
class Adapter:
    """A LoRA file that fits a transformer.

    factors, differences: by their names in diffusers' model; factors of layers, and what is added to a whole tensor
    scaling: of the product of a layer's factors, by the layer: alpha / rank, where the file has not done that already
    config: of peft's `LoraConfig`, from the file
    """

    file: LoraFile
    factors: Mapping[str, Tensor]
    differences: Mapping[str, Tensor]
    scaling: Mapping[str, float]
    config: Mapping[str, Any] | None

    def describe(self) -> str:
        more = f" and {len(self.differences)} whole tensors" if self.differences else ""
        return f"{self.file.file} at {self.file.scale:g}, {len(self.scaling)} layers{more}"


def read_lora(file: LoraFile, model: WanTransformer3DModel) -> Adapter:
    """Read a LoRA in diffusers', Wan's, ComfyUI's or musubi's names for a transformer on the meta device.

    Raises `InputError` for a file that is not there, is damaged or is not safetensors, and for one of which nothing,
    or not all, fits the transformer.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError("lora needs peft, which is not installed; pip install peft")
    path = weight_file("lora", file.file, (SAFETENSORS,))
    # In float32 the scaling that converters do rounds nothing.
    tensors = {name: tensor.float() for name, tensor in WeightFiles([path])}
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise InputError(f"lora {path}: {broken[0]!r} has values that are not finite; use a file without such")
    differences, unknown = _take_differences(tensors, model)
    strange = [name for name in tensors if not name.endswith(KINDS)]
    factors = _convert(path, {name: tensor for name, tensor in tensors.items() if name.endswith(KINDS)}, model)
    unknown += strange + _misfits(factors, model)
    count = len(differences) + len(strange) + len(factors)
    if unknown or not count:
        raise _mismatch(path, count, unknown)
    _check_shapes(path, factors, differences, model)
    trial, config = copy.deepcopy(model), _config(path)
    with damage(path):
        _inject(trial, NAME, factors, config)
    layers = {name.partition(".lora_")[0] for name in factors}
    scaling = {layer: trial.get_submodule(layer).scaling[NAME] for layer in layers}
    return Adapter(file, factors, differences, scaling, config)


def _mismatch(path: Path, count: int, unknown: Sequence[str]) -> InputError:
    sample = f", not for example {unknown[0]!r}" if unknown else ""
    return InputError(
        f"lora {path}: {count - len(unknown)} of {count} weights match the transformer{sample}; "
        "use a LoRA made for text-to-video of this size"
    )


def merging(adapters: Sequence[Adapter], device: torch.device | str) -> Callable[[str, Tensor], Tensor]:
    """A function from a name and tensor of the transformer to the tensor with all adapters merged into it.

    It computes on `device`, in float32 or more.
    """

    def merge(name: str, tensor: Tensor) -> Tensor:
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
def attach(model: WanTransformer3DModel, adapters: Sequence[Adapter], dtype: torch.dtype) -> None:
    """Put adapters beside the weights of a transformer that cannot take them in, because they are packed, in place."""
    scales = {}
    for number, adapter in enumerate(adapters):
        for name, difference in adapter.differences.items():
            _add(model, name, adapter.file.scale * difference, adapter.file.file)
        if adapter.factors:
            name = f"{NAME}{number}"
            _inject(model, name, {key: factor.to(dtype) for key, factor in adapter.factors.items()}, adapter.config)
            scales[name] = adapter.file.scale
    if scales:
        model.set_adapters(list(scales), list(scales.values()))
    model.requires_grad_(False)


def _add(model: WanTransformer3DModel, name: str, difference: Tensor, file: str) -> None:
    path, _, kind = name.rpartition(".")
    module = model.get_submodule(path)
    parameter = getattr(getattr(module, "base_layer", module), kind)
    if not parameter.is_floating_point():
        raise InputError(f"lora {file} changes the whole of {name}, which is packed; use it with safetensors")
    parameter += difference.to(parameter)


def _inject(
    model: WanTransformer3DModel, name: str, factors: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> None:
    """Put peft's layers around those that have factors, as an adapter of this name."""
    if not factors:
        return
    with warnings.catch_warnings():
        # Several adapters are meant.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        model.load_lora_adapter(
            dict(factors), prefix=None, adapter_name=name, metadata=config and dict(config), low_cpu_mem_usage=True
        )


def _take_differences(tensors: dict[str, Tensor], model: WanTransformer3DModel) -> tuple[dict[str, Tensor], list[str]]:
    """Take the differences out of a file's tensors: by their names in the model, and the names of those not in it.

    diffusers' converter leaves those of norms and modulations out.
    """
    rename = published.tensor_name(model)
    own = {rename(name): name for name in model.state_dict()}
    found, unknown = {}, []
    for name in list(tensors):
        layer, _, kind = name.rpartition(".")
        if kind in DIFFERENCES:
            difference = tensors.pop(name)
            target = own.get(f"{layer.removeprefix(WAN)}.{DIFFERENCES[kind]}")
            found[target or name] = difference
            unknown += [] if target else [name]
    return found, unknown


def _convert(path: Path, tensors: dict[str, Tensor], model: WanTransformer3DModel) -> dict[str, Tensor]:
    """Factors by their names in the model, A before B, for which peft looks at the first."""
    if not tensors:
        return {}
    # diffusers takes musubi's names only of files that have all layers, and ComfyUI's of any.
    rename = published.tensor_name(model)
    layers = [rename(name).removesuffix(".weight") for name in model.state_dict()]
    musubi = {MUSUBI + layer.replace(".", "_"): WAN + layer for layer in layers}
    for name in list(tensors):
        layer, _, kind = name.partition(".")
        if layer in musubi:
            tensors[f"{musubi[layer]}.{kind}"] = tensors.pop(name)
    if not any(name.startswith((DIFFUSERS, WAN, MUSUBI)) for name in tensors):
        own = {name for name, _ in model.named_modules()}
        prefix = DIFFUSERS if any(name.partition(".lora_")[0] in own for name in tensors) else WAN
        tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    try:
        converted = WanLoraLoaderMixin.lora_state_dict(tensors)
    except (KeyError, ValueError, IndexError) as error:
        strange = [name.removeprefix(WAN) for name in tensors if not _is_known(name, tensors, set(layers))]
        if 0 < len(strange) < len(tensors):
            raise _mismatch(path, len(tensors), strange) from error
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
        raise InputError(
            f"lora {path}: 0 of {len(tensors)} weights match, since diffusers cannot convert their names ({reason}); "
            "use one made for Wan2.1 text-to-video"
        ) from error
    return {name.removeprefix(DIFFUSERS): tensor for name, tensor in sorted(converted.items())}


def _is_known(name: str, tensors: Mapping[str, Tensor], layers: Set[str]) -> bool:
    """Whether a name in a file is of a layer of the model, by its published name, and no factor without the other."""
    kind = next(kind for kind in KINDS if name.endswith(kind))
    layer = name.removesuffix(f".{kind}")
    pair = next((pair for pair in PAIRS if kind in pair), (kind,))
    return layer.removeprefix(WAN) in layers and all(f"{layer}.{one}" in tensors for one in pair)


def _misfits(factors: Mapping[str, Tensor], model: WanTransformer3DModel) -> list[str]:
    """The names of what is not one of a pair of factors of a linear layer of the model."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    pairs = [tuple(f"{layer}.lora_{factor}" for factor in FACTORS) for layer in layers]
    fit = {name for pair in pairs if all(one in factors for one in pair) for name in pair}
    return [name for name in factors if name not in fit]


def _check_shapes(
    path: Path, factors: Mapping[str, Tensor], differences: Mapping[str, Tensor], model: WanTransformer3DModel
) -> None:
    state = model.state_dict()
    shapes = {name: tuple(difference.shape) for name, difference in differences.items()}
    for name, factor in factors.items():
        layer, _, kind = name.partition(".lora_")
        if kind == FACTORS[0]:
            up = factors[f"{layer}.lora_{FACTORS[1]}"]
            fits = factor.ndim == up.ndim == 2 and len(factor) == up.shape[1]
            shapes[f"{layer}.weight"] = (len(up), factor.shape[1]) if fits else (*up.shape, *factor.shape)
    for name, shape in shapes.items():
        if shape != tuple(state[name].shape):
            raise InputError(
                f"lora {path} is for a {name} of {shape}, and here it is {tuple(state[name].shape)}; "
                "use one made for a transformer of this size"
            )


def _config(path: Path) -> dict[str, Any] | None:
    """The `LoraConfig` that diffusers saves with a LoRA."""
    with damage(path), safe_open(path, framework="pt") as opened:
        text = (opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
        return None if text is None else {k.removeprefix(DIFFUSERS): v for k, v in json.loads(text).items()}
