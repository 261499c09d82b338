"""Random text encoders of Kandinsky-5 and small tokenizers for them, under the names that the hub has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextModel,
)

from wan.checkpoints.random_weights import captions

Shapes = dict[str, tuple[int, ...]]
QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)
CLIP_TOKENS = ("<|startoftext|>", "<|endoftext|>")
CLIP_POSITIONS = 77
# Room for whole words of the captions, and for all bytes.
WORDS = 800


@dataclass(frozen=True)
class QwenSizes:
    """Of the language model of a Qwen2.5-VL; those of Qwen2.5-VL-7B."""

    dim: int = 3584
    heads: int = 28
    key_heads: int = 4
    layers: int = 28
    ffn_dim: int = 18944
    vocabulary: int = 152064
    # Pairs of a head's numbers that turn with the frame, the row and the column.
    rope: tuple[int, int, int] = (16, 24, 24)
    vision: VisionSizes | None = None


@dataclass(frozen=True)
class VisionSizes:
    """Of the vision tower of a Qwen2.5-VL, which sizes without it leave out."""

    dim: int
    heads: int
    layers: int
    ffn_dim: int


@dataclass(frozen=True)
class ClipSizes:
    """Of the text model of a CLIP; those of CLIP-L/14."""

    dim: int = 768
    heads: int = 12
    layers: int = 12
    ffn_dim: int = 3072
    vocabulary: int = 49408


def qwen_config(sizes: QwenSizes) -> dict[str, Any]:
    """The config.json of a Qwen2.5-VL as its own repository has it, flat."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "bos_token_id": min(151643, sizes.vocabulary - 2),
        "eos_token_id": min(151645, sizes.vocabulary - 1),
        "hidden_act": "silu",
        "hidden_size": sizes.dim,
        "intermediate_size": sizes.ffn_dim,
        "max_position_embeddings": 128000,
        "max_window_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.key_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"type": "mrope", "mrope_section": list(sizes.rope)},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vision_config": _vision_config(sizes),
        "vocab_size": sizes.vocabulary,
    }


def _vision_config(sizes: QwenSizes) -> dict[str, Any]:
    vision = VisionSizes(1280, 16, 32, 3420) if sizes.vision is None else sizes.vision
    return {
        "model_type": "qwen2_5_vl",
        "depth": vision.layers,
        "fullatt_block_indexes": [vision.layers - 1],
        "hidden_act": "silu",
        "hidden_size": vision.dim,
        "in_chans": 3,
        "intermediate_size": vision.ffn_dim,
        "num_heads": vision.heads,
        "out_hidden_size": sizes.dim,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
    }


def clip_config(sizes: ClipSizes) -> dict[str, Any]:
    """The config.json of a whole CLIP, as the hub has it; of its parts the text model alone is written."""
    text = {
        "model_type": "clip_text_model",
        "bos_token_id": 0,
        # By this number, which is older than the right one, the last token is the one with the highest id.
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": sizes.dim,
        "intermediate_size": sizes.ffn_dim,
        "max_position_embeddings": CLIP_POSITIONS,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "projection_dim": sizes.dim,
        "vocab_size": sizes.vocabulary,
    }
    return {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": sizes.dim, "text_config": text}


def meta_qwen(sizes: QwenSizes) -> Qwen2_5_VLTextModel:
    """The language model on the meta device."""
    with torch.device("meta"):
        return Qwen2_5_VLTextModel(Qwen2_5_VLConfig(**qwen_config(sizes)).text_config)


def meta_clip(sizes: ClipSizes) -> CLIPTextModel:
    """CLIP's text model on the meta device."""
    with torch.device("meta"):
        return CLIPTextModel(CLIPConfig(**clip_config(sizes)).text_config)


def qwen_shapes(sizes: QwenSizes) -> Shapes:
    """Published names and shapes of the language model and of what encoding has no use for: its head, and vision."""
    state = meta_qwen(sizes).state_dict()
    shapes = {f"model.{name}": tuple(tensor.shape) for name, tensor in state.items()}
    shapes["lm_head.weight"] = sizes.vocabulary, sizes.dim
    if sizes.vision is not None:
        with torch.device("meta"):
            whole = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**qwen_config(sizes)))
        vision = whole.model.visual.state_dict()
        shapes |= {f"visual.{name}": tuple(tensor.shape) for name, tensor in vision.items()}
    return shapes


def clip_shapes(sizes: ClipSizes) -> Shapes:
    """Published names and shapes of CLIP's text model."""
    return {f"text_model.{name}": tuple(tensor.shape) for name, tensor in meta_clip(sizes).state_dict().items()}


def qwen_tokenizer(vocabulary: int, texts: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A small tokenizer with Qwen's special tokens, trained on captions of simple scenes and on texts."""
    tokenizer = _trained([*captions(), *texts], vocabulary, QWEN_TOKENS)
    pad, _, end, *_ = QWEN_TOKENS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=end, padding_side="right")


def clip_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A small tokenizer of lower-case texts between CLIP's special tokens, of which the last has the highest id."""
    tokenizer = _trained(captions(), vocabulary, CLIP_TOKENS)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    begin, end = CLIP_TOKENS
    marks = [(mark, tokenizer.token_to_id(mark)) for mark in CLIP_TOKENS]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A {end}", special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=end,
        unk_token=end,
        model_max_length=CLIP_POSITIONS,
    )


def _trained(texts: Iterable[str], vocabulary: int, special: Sequence[str]) -> Tokenizer:
    """A BPE of bytes, so that there is no text which it does not know; special tokens have the highest ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, WORDS) - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(special))
    return tokenizer
