"""Files of weights as people share them, made from a random transformer: LoRA in each naming, float8, GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wan.models.wan import names

Factors = Mapping[str, tuple[Tensor, Tensor]]
NAMINGS = ("diffusers", "diffusers without prefix", "wan", "comfyui", "comfyui down and up", "musubi")
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
ALPHA = 6.0


def draw_factors(model: nn.Module, rank: int = 3, seed: int = 0) -> Factors:
    """A pair of factors, (rank, in) and (out, rank), for each linear layer of the blocks."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, layer.in_features, generator=draw) * 0.1,
            torch.randn(layer.out_features, rank, generator=draw) * 0.1,
        )
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.startswith("blocks.") and name.endswith(LAYERS)
    }


def lora_tensors(factors: Factors, naming: str) -> dict[str, Tensor]:
    """The tensors of a LoRA file; the last two namings have an alpha, so that they count ALPHA / rank times."""
    tensors = {}
    for name, (down, up) in factors.items():
        wan = names.published(f"{name}.", names.TRANSFORMER).removesuffix(".")
        stem, first, second = {
            "diffusers": (f"transformer.{name}", "lora_A", "lora_B"),
            "diffusers without prefix": (name, "lora_A", "lora_B"),
            "wan": (wan, "lora_A", "lora_B"),
            "comfyui": (f"diffusion_model.{wan}", "lora_A", "lora_B"),
            "comfyui down and up": (f"diffusion_model.{wan}", "lora_down", "lora_up"),
            "musubi": (f"lora_unet_{wan.replace('.', '_')}", "lora_down", "lora_up"),
        }[naming]
        tensors |= {f"{stem}.{first}.weight": down, f"{stem}.{second}.weight": up}
        if naming in NAMINGS[-2:]:
            tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
    return tensors


def write_lora(file: Path, factors: Factors, naming: str = "comfyui") -> Path:
    save_file(lora_tensors(factors, naming), file)
    return file


def write_float8(file: Path, state: Mapping[str, Tensor], per_row: bool = False) -> dict[str, Tensor]:
    """Write published tensors as ComfyUI's scaled float8 files hold them; returns what they stand for."""
    stored: dict[str, Tensor] = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    exact = {}
    for name, tensor in state.items():
        key = f"model.diffusion_model.{name}"
        if tensor.ndim == 2 and name.startswith("blocks."):
            largest = tensor.abs().amax(dim=1) if per_row else tensor.abs().amax()
            scale = largest.float() / torch.finfo(torch.float8_e4m3fn).max
            rows = scale[:, None] if per_row else scale
            stored[key] = (tensor / rows).to(torch.float8_e4m3fn)
            layer = key.removesuffix(".weight")
            stored[f"{layer}.{'weight_scale' if per_row else 'scale_weight'}"] = scale
            stored[f"{layer}.scale_input"] = torch.ones(())
            exact[name] = stored[key].float() * rows
        else:
            stored[key] = tensor.to(torch.float16)
            exact[name] = stored[key].float()
    save_file(stored, file)
    return exact


def write_gguf(
    file: Path, state: Mapping[str, Tensor], kind: str = "Q8_0", prefix: str = "", all_packed: bool = False
) -> dict[str, Tensor]:
    """Write tensors as GGUF, the matrices of the blocks or of all layers packed; returns what they stand for."""
    import gguf

    writer, exact = gguf.GGUFWriter(file, "wan"), {}
    for name, tensor in state.items():
        array = tensor.float().numpy()
        is_packed = tensor.ndim == 2 and (all_packed or name.startswith("blocks."))
        packed = gguf.GGMLQuantizationType[kind if is_packed else "F32"]
        if name.endswith("patch_embedding.weight"):
            packed = gguf.GGMLQuantizationType.BF16
        data = gguf.quantize(array, packed)
        exact[name] = torch.from_numpy(gguf.dequantize(data, packed).reshape(array.shape).copy())
        writer.add_tensor(prefix + name, data, raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact
