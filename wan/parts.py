"""The parts of a checkpoint, in either layout, as diffusers' and transformers' models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from nabla.config import is_number
from wan import published
from wan.checkpoint import OWN_KEYS, Checkpoint
from wan.checks import PATCH, VAE_STRIDE
from wan.lora import Adapter, attach, merging
from wan.single_file import FIRST, GgufFile, load_gguf, open_transformer
from wan.weights import CheckpointError, Part, WeightFiles, read_json

MODEL_STEM = "diffusion_pytorch_model"
TEXT_ENCODER_STEM = "model"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
VAE_FILE = "Wan2.1_VAE.pth"
PAD_TOKEN = "<pad>"
# The text encoder's second name for `shared.weight`, under which a file may hold it again.
TIED = "encoder.embed_tokens.weight"


def transformer_part(checkpoint: Checkpoint, file: str | Path | None = None) -> Part:
    """The transformer; diffusers keeps its norms, modulations and time embedding in float32.

    file: holds its weights in place of the checkpoint's, see `wan.single_file`; it must be of the same sizes
    """
    folder = checkpoint.folder if checkpoint.published else checkpoint.folder / "transformer"
    weights = WeightFiles.find(folder, MODEL_STEM) if file is None else open_transformer(file)
    if checkpoint.published:
        with _fits(WanTransformer3DModel, weights):
            model = published.transformer(checkpoint.config, weights.shapes)
    else:
        model = _model(WanTransformer3DModel, checkpoint.config, weights)
    if tuple(model.config.patch_size) != PATCH:
        raise CheckpointError(f"{folder} is not a transformer of Wan2.1: its patch must be {PATCH}")
    if file is not None:
        _check_size(model, weights, checkpoint)
    return _part(model, weights, checkpoint.published or file is not None)


def load_transformer(
    part: Part,
    dtype: torch.dtype,
    device: torch.device | str,
    shard: Callable[[nn.Module], None] | None = None,
    adapters: Sequence[Adapter] = (),
    pack: Callable[[str, Tensor], Tensor] | None = None,
) -> WanTransformer3DModel:
    """The weights of `transformer_part`, and what is not saved with them; see `Part.load`.

    adapters: LoRA that is merged into the weights in float32, or that stays beside them if they are packed
    pack: what packs the weights while they are read, see `wan.packing`
    """
    if isinstance(part.weights, GgufFile):
        model = load_gguf(part, dtype, device)
        attach(model, adapters, dtype)
    else:
        model = part.load(dtype, device, shard, merging(adapters, device) if adapters else None, pack)
    finish_transformer(model, device)
    return model


def finish_transformer(model: WanTransformer3DModel, device: torch.device | str) -> None:
    """Give a transformer that was made on the meta device what is not saved with its weights."""
    own = model.config
    model.rope = WanRotaryPosEmbed(own.attention_head_dim, own.patch_size, own.rope_max_seq_len).to(device)
    model.condition_embedder.timesteps_proj = PublishedTimesteps(own.freq_dim)


def vae_part(checkpoint: Checkpoint) -> Part:
    """The VAE; without statistics of its latents in its configuration it has the published ones."""
    if checkpoint.published:
        weights = WeightFiles([checkpoint.folder / VAE_FILE])
        with _fits(AutoencoderKLWan, weights):
            model = published.vae(weights.shapes)
    else:
        weights = WeightFiles.find(checkpoint.folder / "vae", MODEL_STEM)
        model = _model(AutoencoderKLWan, read_json(checkpoint.folder / "vae" / "config.json"), weights)
    own, where = model.config, weights.files[0].parent
    strides = own.scale_factor_temporal, own.scale_factor_spatial, own.scale_factor_spatial
    if strides != VAE_STRIDE or own.patch_size is not None:
        raise CheckpointError(f"{where} is not the VAE of Wan2.1: its strides must be {VAE_STRIDE}")
    for name, values in (("latents_mean", own.latents_mean), ("latents_std", own.latents_std)):
        if not isinstance(values, (list, tuple)) or len(values) != own.z_dim or not all(map(is_number, values)):
            raise CheckpointError(f"{where}: the VAE's {name} is {values!r}, but must be {own.z_dim} numbers")
    if min(own.latents_std) <= 0:
        raise CheckpointError(f"{where}: the VAE's latents_std is {own.latents_std}, but must be above 0")
    return _part(model, weights, checkpoint.published)


def text_encoder_part(checkpoint: Checkpoint, dtype: torch.dtype) -> Part:
    """The text encoder; in float16 some of its layers overflow, which transformers keeps in float32 then."""
    if checkpoint.published:
        weights = WeightFiles([checkpoint.folder / TEXT_ENCODER_FILE])
        with _fits(UMT5EncoderModel, weights):
            model = published.text_encoder(weights.shapes)
    else:
        weights = WeightFiles.find(checkpoint.folder / "text_encoder", TEXT_ENCODER_STEM)
        config = read_json(checkpoint.folder / "text_encoder" / "config.json")
        with _fits(UMT5EncoderModel, weights), torch.device("meta"):
            model = UMT5EncoderModel(UMT5Config(**config))
    return _part(model, weights, checkpoint.published, keeps_float32=dtype == torch.float16)


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


def _model(kind: type[nn.Module], config: dict[str, Any], weights: WeightFiles) -> nn.Module:
    """A model of diffusers by its configuration, on the meta device."""
    settings = {key: value for key, value in config.items() if not key.startswith("_") and key not in OWN_KEYS}
    with _fits(kind, weights), torch.device("meta"):
        return kind(**settings)


def _part(model: nn.Module, weights: WeightFiles, is_published: bool, keeps_float32: bool = True) -> Part:
    rename = published.tensor_name(model) if is_published else str
    own = {rename(name): name for name in model.state_dict() if name != TIED or TIED in weights.shapes}
    return Part(model, weights, own, tuple(model._keep_in_fp32_modules or ()) if keeps_float32 else ())


def _check_size(model: WanTransformer3DModel, weights: WeightFiles, checkpoint: Checkpoint) -> None:
    own, shapes = model.config, weights.shapes
    there = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}), shapes[FIRST][0]
    here = own.num_layers, own.num_attention_heads * own.attention_head_dim
    if there != here:
        raise CheckpointError(
            f"{weights.where} has {there[0]} blocks of width {there[1]}, but checkpoint {checkpoint.name} is of "
            f"{here[0]} blocks of width {here[1]}; name its own base checkpoint with --ckpt_dir"
        )


@contextmanager
def _fits(kind: type[nn.Module], weights: WeightFiles) -> Iterator[None]:
    """Turn whatever a model raises for a configuration that makes no sense into one clear line."""
    try:
        yield
    except Exception as error:
        where, reason = weights.where, f"{type(error).__name__} {' '.join(str(error).split())[:200]}"
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
