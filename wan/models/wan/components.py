"""The components of a checkpoint, in either layout, as diffusers' and transformers' models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from nabla.checks import is_count
from wan.checkpoints.component import Component, fitting
from wan.checkpoints.file_errors import CheckpointError, exists, read_json_object, require_file
from wan.checkpoints.gguf_file import GgufFile, load_gguf
from wan.checkpoints.locate import CONFIG
from wan.checkpoints.lora import Adapter, attach, merging
from wan.checkpoints.single_file import open_transformer
from wan.checkpoints.tokenizer import check_vocabulary, read_tokenizer
from wan.checkpoints.weights import WeightFiles
from wan.models.checkpoint import Checkpoint
from wan.models.wan import published
from wan.models.wan.component_configs import check_transformer, text_config
from wan.models.wan.geometry import GEOMETRY
from wan.models.wan.kinds import KINDS, kind_of
from wan.models.wan.layout import EXPERT_FILES, OWN_KEYS, TEXT_ENCODER, TRANSFORMER
from wan.models.wan.names import NAMING
from wan.models.wan.recognise import kind_of_weights
from wan.models.wan.vae_component import vae_component as vae_component

PAD_TOKEN = "<pad>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# The rotary embedding divides a head's channels among three axes.
MIN_HEAD = 6
# The text encoder's second name for `shared.weight`, under which a file may hold it again.
TIED = "encoder.embed_tokens.weight"


def transformer_component(
    checkpoint: Checkpoint, file: str | Path | None = None, expert: str | None = None
) -> Component:
    """A transformer; diffusers keeps its norms, modulations and time embedding in float32.

    file: holds its weights in place of the checkpoint's, see `wan.checkpoints.single_file`; of the same sizes
    expert: which of two it is, "high" or "low"; None for the first, or the only one
    Raises `CheckpointError` for what is not there whole, or is of another kind than the checkpoint.
    """
    experts = kind_of(checkpoint.layout).experts
    if expert is not None and expert not in experts:
        have = f"has {' and '.join(experts)}" if experts else "has one transformer"
        raise CheckpointError(f"there is no {expert} expert of checkpoint {checkpoint.name}, which {have}")
    name = EXPERT_FILES[experts.index(expert)].name if expert is not None else TRANSFORMER.name
    weights = checkpoint.weights_of(name) if file is None else open_transformer(file, NAMING)
    _check_kind(weights, checkpoint)
    if file is not None:
        _check_size(weights, checkpoint)
    config = checkpoint.transformer_config(name)
    is_vace = checkpoint.kind == "vace"
    with fitting(WanTransformer3DModel.__name__, weights):
        if checkpoint.published:
            model = published.transformer(config, weights.shapes)
        else:
            # A file has published names, by which its layers are counted the same.
            check_transformer(config, weights.shapes)
            model = _model(WanVACETransformer3DModel if is_vace else WanTransformer3DModel, config)
    if tuple(model.config.patch_size) != GEOMETRY.patch:
        raise CheckpointError(f"{weights.where} is not a transformer of Wan: its patch must be {GEOMETRY.patch}")
    if model.config.attention_head_dim % 2 or model.config.attention_head_dim < MIN_HEAD or model.config.freq_dim % 2:
        raise CheckpointError(
            f"{weights.where}: its heads' and frequencies' sizes must be even, and heads of {MIN_HEAD} at least"
        )
    return _component(model, weights, checkpoint.published or file is not None)


def load_transformer(
    component: Component,
    dtype: torch.dtype,
    device: torch.device | str,
    shard: Callable[[nn.Module], None] | None = None,
    adapters: Sequence[Adapter] = (),
    quantize: Callable[[str, Tensor], Tensor] | None = None,
) -> WanTransformer3DModel:
    """The weights of `transformer_component`, and what is not saved with them; see `Component.load`.

    adapters: LoRA that is merged into the weights in float32, or that stays beside them if they are packed
    quantize: what quantises the weights while they are read, see `wan.quantize.quantizer`
    """
    if isinstance(component.weights, GgufFile):
        model = load_gguf(component, dtype, device)
        attach(model, adapters, dtype)
    else:
        model = component.load(dtype, device, shard, merging(adapters, device) if adapters else None, quantize)
    finish_transformer(model, device)
    return model


def finish_transformer(model: WanTransformer3DModel, device: torch.device | str) -> None:
    """Give a transformer that was made on the meta device what is not saved with its weights."""
    own = model.config
    # Its tables are not in the state dict, so that loading leaves them on the meta device.
    model.rope = WanRotaryPosEmbed(own.attention_head_dim, own.patch_size, own.rope_max_seq_len).to(device)
    model.condition_embedder.timesteps_proj = PublishedTimesteps(own.freq_dim)


def text_encoder_component(checkpoint: Checkpoint, dtype: torch.dtype) -> Component:
    """The text encoder; in float16 some of its layers overflow, which transformers keeps in float32 then."""
    weights = checkpoint.weights_of(TEXT_ENCODER.name)
    if checkpoint.published:
        with fitting(UMT5EncoderModel.__name__, weights):
            model = published.text_encoder(weights.shapes)
    else:
        config = read_json_object(checkpoint.folder / TEXT_ENCODER.name / CONFIG)
        with fitting(UMT5EncoderModel.__name__, weights), torch.device("meta"):
            model = UMT5EncoderModel(text_config(config, weights.shapes))
    return _component(model, weights, checkpoint.published, keeps_float32=dtype == torch.float16)


def load_tokenizer(checkpoint: Checkpoint, vocabulary: int) -> PreTrainedTokenizerFast | None:
    """The tokenizer exactly as `tokenizer.json` states it, or None if the checkpoint has none.

    transformers' AutoTokenizer would rebuild a T5 tokenizer, with other ids for unknown and Chinese characters.
    Raises `CheckpointError` if it is damaged or gives ids beyond the text encoder's vocabulary.
    """
    folder = checkpoint.tokenizer_folder
    if not exists(folder / "tokenizer.json"):
        return None
    for name in TOKENIZER_FILES:
        if exists(folder / name):
            require_file(folder / name)
    tokenizer = read_tokenizer(folder)
    tokenizer.pad_token = tokenizer.pad_token or PAD_TOKEN
    check_vocabulary(tokenizer, vocabulary, folder, (PAD_TOKEN,))
    return tokenizer


def _model(kind: type[nn.Module], config: Mapping[str, Any]) -> nn.Module:
    """A model of diffusers by its configuration, on the meta device."""
    settings = {key: value for key, value in config.items() if not key.startswith("_") and key not in OWN_KEYS}
    with torch.device("meta"):
        return kind(**settings)


def _component(model: nn.Module, weights: WeightFiles, is_published: bool, keeps_float32: bool = True) -> Component:
    rename = published.tensor_name(model) if is_published else str
    # A file may hold the table of tokens once, and then it is tied after loading, or under both names.
    own = {rename(name): name for name in model.state_dict() if name != TIED or TIED in weights.shapes}
    return Component(model, weights, own, tuple(model._keep_in_fp32_modules or ()) if keeps_float32 else ())


def _check_kind(weights: WeightFiles, checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` for the tensors of another kind of Wan."""
    own = kind_of(checkpoint.layout)
    kind = KINDS[kind_of_weights(weights, bool(own.experts))]
    if kind is not own:
        raise CheckpointError(
            f"{weights.where} is a transformer of {kind.name}, {kind.what}, and checkpoint {checkpoint.name} is "
            f"{own.name}, {own.what}; give one of that, or name its own base checkpoint with --ckpt_dir"
        )


def _check_size(weights: WeightFiles, checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` for a file of another size than its checkpoint, before tensors are named one by one."""
    config = checkpoint.config
    if checkpoint.published:
        width = config.get("dim")
    else:
        heads, size = config.get("num_attention_heads", 40), config.get("attention_head_dim", 128)
        width = heads * size if is_count(heads) and is_count(size) else None
    here = config.get("num_layers", 40), width
    blocks = {name.split(".")[1] for name in weights.shapes if name.startswith("blocks.")}
    there = len(blocks), next(iter(weights.shapes[NAMING.first_weight]), 0)
    # What is no size is found when the model is made.
    if all(map(is_count, here)) and there != here:
        raise CheckpointError(
            f"{weights.where} has {there[0]} blocks of width {there[1]}, but checkpoint {checkpoint.name} is of "
            f"{here[0]} blocks of width {here[1]}; name its own base checkpoint with --ckpt_dir"
        )


class PublishedTimesteps(nn.Module):
    """Sinusoids of timesteps (B,) as float32 (B, channels), their angles in float64 as in the published program.

    diffusers' float32 angles alone move a forward by 6e-6 of its size, ten times all other differences together.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.half = channels // 2

    def forward(self, timestep: Tensor) -> Tensor:
        # Frequencies 10000^(-n / half), and cosines before sines, as the weights behind them were trained with.
        exponent = torch.arange(self.half, dtype=torch.float64, device=timestep.device) / self.half
        angle = timestep.double()[:, None] * torch.pow(10000, -exponent)
        return torch.cat((angle.cos(), angle.sin()), dim=-1).float()
