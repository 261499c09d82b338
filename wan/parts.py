"""The parts of a checkpoint, in either layout, as diffusers' and transformers' models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from nabla.config import is_count
from wan import names
from wan.checkpoint import Checkpoint
from wan.config import PATCH, VAE_STRIDE
from wan.weights import CheckpointError, Part, WeightFiles, read_json

MODEL_STEM = "diffusion_pytorch_model"
TEXT_ENCODER_STEM = "model"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
VAE_FILE = "Wan2.1_VAE.pth"
PAD_TOKEN = "<pad>"


def transformer_part(checkpoint: Checkpoint) -> Part:
    """The transformer; diffusers keeps its norms, modulations and time embedding in float32."""
    folder = checkpoint.folder if checkpoint.published else checkpoint.folder / "transformer"
    weights = WeightFiles.find(folder, MODEL_STEM)
    if checkpoint.published:
        config = _published_transformer_config(checkpoint.config, weights)
        rename = functools.partial(names.published, rules=names.TRANSFORMER)
    else:
        config, rename = checkpoint.config, str
    part = _part(WanTransformer3DModel, config, weights, rename)
    if tuple(part.model.config.patch_size) != PATCH:
        raise CheckpointError(f"{folder} is not a transformer of Wan2.1: its patch must be {PATCH}")
    return part


def load_transformer(
    part: Part, dtype: torch.dtype, device: torch.device | str, shard: Callable[[nn.Module], None] | None = None
) -> WanTransformer3DModel:
    """The weights of `transformer_part`, and what is not saved with them; see `Part.load`."""
    model = part.load(dtype, device, shard)
    finish_transformer(model, device)
    return model


def finish_transformer(model: WanTransformer3DModel, device: torch.device | str) -> None:
    """Give a transformer that was made on the meta device what is not saved with its weights."""
    own = model.config
    model.rope = WanRotaryPosEmbed(own.attention_head_dim, own.patch_size, own.rope_max_seq_len).to(device)
    model.condition_embedder.timesteps_proj = PublishedTimesteps(own.freq_dim)


def vae_part(checkpoint: Checkpoint) -> Part:
    if not checkpoint.published:
        weights = WeightFiles.find(checkpoint.folder / "vae", MODEL_STEM)
        part = _part(AutoencoderKLWan, read_json(checkpoint.folder / "vae" / "config.json"), weights, str)
        own = part.model.config
        strides = own.scale_factor_temporal, own.scale_factor_spatial, own.scale_factor_spatial
        if strides != VAE_STRIDE or own.patch_size is not None or len(own.latents_mean) != own.z_dim:
            raise CheckpointError(
                f"{checkpoint.folder / 'vae'} is not the VAE of Wan2.1: its strides must be {VAE_STRIDE}"
            )
        return part
    weights = WeightFiles([checkpoint.folder / VAE_FILE])
    config = _published_vae_config(weights)
    rename = functools.partial(names.published_vae, residuals=config["num_res_blocks"] + 1)
    return _part(AutoencoderKLWan, config, weights, rename)


def text_encoder_part(checkpoint: Checkpoint, dtype: torch.dtype) -> Part:
    """The text encoder; in float16 some of its layers overflow, which transformers keeps in float32 then."""
    if checkpoint.published:
        weights = WeightFiles([checkpoint.folder / TEXT_ENCODER_FILE])
        config, rename = _published_text_config(weights), functools.partial(names.published, rules=names.TEXT_ENCODER)
    else:
        weights = WeightFiles.find(checkpoint.folder / "text_encoder", TEXT_ENCODER_STEM)
        config, rename = read_json(checkpoint.folder / "text_encoder" / "config.json"), str
    with _fits(UMT5EncoderModel, weights), torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**config))
    tied = "encoder.embed_tokens.weight"
    own = {rename(name): name for name in model.state_dict() if name != tied or tied in weights.shapes}
    float32 = tuple(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else ()
    return Part(model, weights, own, float32)


def load_tokenizer(checkpoint: Checkpoint, vocabulary: int) -> PreTrainedTokenizerFast | None:
    """The tokenizer exactly as `tokenizer.json` states it, or None if the checkpoint has none.

    transformers' AutoTokenizer would rebuild a T5 tokenizer, with other ids for unknown and Chinese characters.
    Raises `CheckpointError` if it is damaged or gives ids beyond the text encoder's vocabulary.
    """
    folder = checkpoint.tokenizer_folder
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="right", truncation_side="right")
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise CheckpointError(f"{folder} is truncated or corrupt ({error}); download it again") from error
    tokenizer.pad_token = tokenizer.pad_token or PAD_TOKEN
    if PAD_TOKEN not in tokenizer.get_vocab() or len(tokenizer) > vocabulary:
        raise CheckpointError(
            f"{folder} does not belong to this text encoder of {vocabulary} tokens; download it again"
        )
    return tokenizer


def _part(kind: type[nn.Module], config: dict[str, Any], weights: WeightFiles, rename: Callable[[str], str]) -> Part:
    settings = {key: value for key, value in config.items() if not key.startswith("_") and key != "sparse_algo"}
    with _fits(kind, weights), torch.device("meta"):
        model = kind(**settings)
    files_to_own = {rename(name): name for name in model.state_dict()}
    return Part(model, weights, files_to_own, tuple(model._keep_in_fp32_modules or ()))


@contextmanager
def _fits(kind: type[nn.Module], weights: WeightFiles) -> Iterator[None]:
    """Turn whatever a model raises for a configuration that makes no sense into one clear line."""
    try:
        yield
    except Exception as error:
        where, reason = weights.files[0].parent, f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
        raise CheckpointError(f"{where}: its configuration does not fit {kind.__name__}: {reason}") from error


class PublishedTimesteps(nn.Module):
    """Sinusoids of timesteps (B,) as float32 (B, channels), their angles in float64 as in the published program.

    diffusers' float32 angles alone move a forward by 6e-6 of its size, ten times all other differences together.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.half = channels // 2

    def forward(self, timestep: Tensor) -> Tensor:
        exponent = torch.arange(self.half, dtype=torch.float64, device=timestep.device) / self.half
        angle = timestep.double()[:, None] * torch.pow(10000, -exponent)
        return torch.cat((angle.cos(), angle.sin()), dim=-1).float()


def _published_transformer_config(config: dict[str, Any], weights: WeightFiles) -> dict[str, Any]:
    with _fits(WanTransformer3DModel, weights):
        heads = _positive(config, "num_heads")
        return {
            "patch_size": tuple(weights.shapes["patch_embedding.weight"][2:]),
            "num_attention_heads": heads,
            "attention_head_dim": _positive(config, "dim") // heads,
            "in_channels": _positive(config, "in_dim"),
            "out_channels": _positive(config, "out_dim"),
            "text_dim": weights.shapes["text_embedding.0.weight"][1],
            "freq_dim": _positive(config, "freq_dim"),
            "ffn_dim": _positive(config, "ffn_dim"),
            "num_layers": _positive(config, "num_layers"),
            "eps": float(config["eps"]),
        }


def _positive(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not is_count(value) or value == 0:
        raise ValueError(f"{key} is {value!r}, but must be a positive integer")
    return value


def _published_vae_config(weights: WeightFiles) -> dict[str, Any]:
    """Sizes off the tensors. The encoder's list of stages is residual blocks, then one `resample` between stages."""
    shapes = weights.shapes
    with _fits(AutoencoderKLWan, weights):
        base = shapes["encoder.conv1.weight"][0]
        count = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder.downsamples."))
        resamples = [n for n in range(count) if f"encoder.downsamples.{n}.resample.1.weight" in shapes]
        last_of_stage = [*(n - 1 for n in resamples), count - 1]
        return {
            "base_dim": base,
            "decoder_base_dim": shapes["decoder.head.0.gamma"][0],
            "z_dim": shapes["conv2.weight"][0],
            "dim_mult": [shapes[f"encoder.downsamples.{n}.residual.6.weight"][0] // base for n in last_of_stage],
            "num_res_blocks": resamples[0],
            "temperal_downsample": [f"encoder.downsamples.{n}.time_conv.weight" in shapes for n in resamples],
        }


def _published_text_config(weights: WeightFiles) -> dict[str, Any]:
    """Sizes off the tensors."""
    shapes = weights.shapes
    with _fits(UMT5EncoderModel, weights):
        vocabulary, width = shapes["token_embedding.weight"]
        buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        return {
            "vocab_size": vocabulary,
            "d_model": width,
            "d_kv": shapes["blocks.0.attn.q.weight"][0] // heads,
            "d_ff": shapes["blocks.0.ffn.fc1.weight"][0],
            "num_layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
            "num_heads": heads,
            "relative_attention_num_buckets": buckets,
        }
