"""The components of a checkpoint, in either layout and wherever they lie, as diffusers' and transformers' models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import Kandinsky5Transformer3DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizerFast, PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from wan.checkpoints.component import Component, fitting
from wan.checkpoints.file_errors import CheckpointError, exists, read_json_object
from wan.checkpoints.locate import CONFIG
from wan.checkpoints.lora import Adapter, merging
from wan.checkpoints.single_file import open_transformer
from wan.checkpoints.tokenizer import check_vocabulary, read_tokenizer
from wan.checkpoints.weights import WeightFiles
from wan.models.checkpoint import Checkpoint
from wan.models.kandinsky import published
from wan.models.kandinsky.layout import (
    MODEL_FOLDER,
    NAME,
    TRANSFORMER_CLASS,
    refuse_gguf,
    transformer_files,
)
from wan.models.kandinsky.names import NAMING
from wan.models.kandinsky.processor import FLOAT32_MODULES, finish_transformer


def transformer_component(checkpoint: Checkpoint, file: str | Path | None = None) -> Component:
    """The transformer; its time embedding, modulations and norms of q and k stay in float32.

    file: holds its weights in place of the checkpoint's, see `wan.checkpoints.single_file`
    """
    if file is not None:
        refuse_gguf(Path(file))
    weights = _transformer_weights(checkpoint) if file is None else open_transformer(file, NAMING)
    with fitting(TRANSFORMER_CLASS, weights):
        model = published.transformer(weights.shapes)
        if not checkpoint.published:
            _check_config(checkpoint.config, model.config)
    own = {name: name for name in model.state_dict()}
    return Component(model, weights, own, FLOAT32_MODULES)


def _transformer_weights(checkpoint: Checkpoint) -> WeightFiles:
    if not checkpoint.published:
        return checkpoint.weights_of("transformer")
    files = transformer_files(checkpoint.folder / MODEL_FOLDER)
    weights = WeightFiles(files)
    weights.where = files[0]
    return weights


def _check_config(config: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a configuration says something else than the tensors do."""
    for key, value in config.items():
        if key in own and not key.startswith(("_", "attention_")):
            said = tuple(value) if isinstance(value, list) else value
            there = tuple(own[key]) if isinstance(own[key], list) else own[key]
            if said != there:
                raise ValueError(f"{key} is {value!r}, but its tensors are of {own[key]!r}")


def load_transformer(
    component: Component,
    dtype: torch.dtype,
    device: torch.device | str,
    shard: Callable[[nn.Module], None] | None = None,
    adapters: Sequence[Adapter] = (),
    quantize: Callable[[str, Tensor], Tensor] | None = None,
) -> Kandinsky5Transformer3DModel:
    """The weights of `transformer_component`, and what is not saved with them; see `Component.load`.

    adapters: LoRA that is merged into the weights in float32
    quantize: what quantises the weights while they are read, see `wan.quantize.quantizer`
    """
    model = component.load(dtype, device, shard, merging(adapters, device) if adapters else None, quantize)
    finish_transformer(model, device)
    return model


def vae_component(checkpoint: Checkpoint) -> Component:
    """The VAE of HunyuanVideo."""
    weights, config = _opened(checkpoint, "vae")
    with fitting("vae", weights):
        model = published.vae(config, weights.shapes)
    return Component(model, weights, {name: name for name in model.state_dict()})


def text_encoder_component(checkpoint: Checkpoint) -> Component:
    """Qwen2.5-VL's language model, without its head and vision."""
    return _text_component(checkpoint, "text_encoder", published.text_encoder, published.text_encoder_name)


def writer_component(checkpoint: Checkpoint, sees: bool) -> Component:
    """The same with its head, which writes text, and, if it `sees`, with its vision."""
    folder = checkpoint.folder_of("text_encoder")
    said = read_json_object(folder / CONFIG) if exists(folder / CONFIG) else {}
    tied = said.get("tie_word_embeddings", False) is True
    make, rename = partial(published.writer, sees=sees), partial(published.writer_name, sees=sees, tied=tied)
    return _text_component(checkpoint, "text_encoder", make, rename)


def text_encoder_2_component(checkpoint: Checkpoint) -> Component:
    """CLIP's text model."""
    return _text_component(checkpoint, "text_encoder_2", published.text_encoder_2, published.text_encoder_2_name)


def _text_component(
    checkpoint: Checkpoint,
    name: str,
    make: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]]], nn.Module],
    rename: Callable[[str], str | None],
) -> Component:
    weights, config = _opened(checkpoint, name)
    with fitting(name, weights):
        # What the files have beside it is known, and not read.
        weights.leave_out(lambda tensor: rename(tensor) is None)
        model = make(config, published.renamed(weights.shapes, rename))
    expected = set(model.state_dict())
    if getattr(model.config, "tie_word_embeddings", False):
        expected -= set(model._tied_weights_keys or ())
    names = {tensor: own for tensor in weights.shapes if (own := rename(tensor)) in expected}
    # Of what is missing the name in the files is not known; the model's own says as much.
    names |= {own: own for own in expected - set(names.values())}
    return Component(model, weights, names)


def load_tokenizer(checkpoint: Checkpoint, name: str, vocabulary: int) -> PreTrainedTokenizerFast | None:
    """A tokenizer exactly as its `tokenizer.json` states it, CLIP's also of a vocabulary and merges; None if the
    checkpoint has none.

    name: as diffusers' pipeline calls it
    Raises `CheckpointError` if it is damaged or gives ids beyond the text encoder's vocabulary.
    """
    files = checkpoint.tokenizer_files(name)
    if not files:
        return None
    folder = files[0].parent
    # Of a vocabulary and merges its class has to say the rest.
    tokenizer = read_tokenizer(folder, PreTrainedTokenizerFast if len(files) == 1 else CLIPTokenizerFast)
    check_vocabulary(tokenizer, vocabulary, folder)
    return tokenizer


def finish_text_encoder(model: nn.Module, device: torch.device | str) -> None:
    """Give a text encoder that was made on the meta device what is not saved with its weights."""
    finish: Any = published.finish_text_encoder
    if isinstance(model, CLIPTextModel):
        finish = published.finish_text_encoder_2
    elif isinstance(model, Qwen2_5_VLForConditionalGeneration):
        finish = published.finish_writer
    finish(model, device)


def _opened(checkpoint: Checkpoint, name: str) -> tuple[WeightFiles, dict[str, Any]]:
    """The files of a component and its configuration."""
    folder = checkpoint.folder_of(name)
    if not exists(folder / CONFIG):
        raise CheckpointError(f"{folder} has no {CONFIG}, so it is no {name} of {NAME}; give it with --{name} DIR")
    return checkpoint.weights_of(name), read_json_object(folder / CONFIG)
