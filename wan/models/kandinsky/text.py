"""Prompts to token ids of both text encoders, and their states to what the transformer was trained with."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from wan.checkpoints.file_errors import CheckpointError
from wan.sampling.texts import describe_cut

# What stands around a prompt, word for word: both misspellings count, since another spelling has other tokens.
BEFORE = (
    "<|im_start|>system\n"
    "You are a promt engineer. Describe the video in detail.\n"
    "Describe how the camera moves or shakes, describe the zoom and view angle, whether it follows the objects.\n"
    "Describe the location of the video, main characters or objects and their action.\n"
    "Describe the dynamism of the video and presented actions.\n"
    "Name the visual style of the video: whether it is a professional footage, user generated content, some kind of "
    "animation, video game or scren content.\n"
    "Describe the visual effects, postprocessing and transitions if they are presented in the video.\n"
    "Pay attention to the order of key actions shown in the scene.<|im_end|>\n"
    "<|im_start|>user\n"
)
# The same around what describes a single picture, a video of one frame.
BEFORE_STILL = (
    "<|im_start|>system\n"
    "You are a promt engineer. Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n"
)
AFTER = "<|im_end|>"
# Tokens of each by the published tokenizer. Their states are cropped.
TOKENS_BEFORE, TOKENS_BEFORE_STILL = 129, 41
# CLIP is small and steers every layer; in bfloat16 its states would be a percent off. The published program does this.
CLIP_DTYPE = torch.float32
# A newline would become one token with that before it, and the crop would take the prompt's first word.
LEADING_NEWLINES = re.compile(r"^\s*[\r\n]+")


def tokens_before(tokenizer: Any | None, still: bool = False) -> int:
    """Tokens in front of a prompt's own; still: in that of a single picture."""
    if tokenizer is None:
        return TOKENS_BEFORE_STILL if still else TOKENS_BEFORE
    return len(tokenizer(BEFORE_STILL if still else BEFORE).input_ids)


def tokenize(tokenizer: Any, prompts: list[str], length: int, still: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B, L) int64 each, of prompts for the language model, as they come; of each at most `length`
    beyond what stands before it.

    still: prompts of single pictures, which stand in a template of their own
    """
    _require(tokenizer)
    most = tokens_before(tokenizer, still) + length
    rows = [tokenizer(_whole(prompt, still), verbose=False).input_ids[:most] for prompt in prompts]
    longest = max(map(len, rows))
    # To the right, which a causal model does not see, whatever the tokenizer would do; with any token.
    ids = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def tokenize_pooled(tokenizer: Any, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B, length) int64 each, of prompts for CLIP; longer ones are cut, as in training."""
    _require(tokenizer)
    tokens = tokenizer(
        prompts,
        padding="max_length",
        truncation=True,
        max_length=length,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return tokens.input_ids, tokens.attention_mask


def cut_note(tokenizer: Any, prompt: str, length: int) -> str | None:
    """A line if a prompt has more tokens than `tokenize` takes: how many, how many are taken, and what is cut off."""
    _require(tokenizer)
    text = LEADING_NEWLINES.sub("", prompt)
    offsets = tokenizer(_whole(prompt), return_offsets_mapping=True, verbose=False).offset_mapping
    starts = [start - len(BEFORE) for start, _ in offsets if len(BEFORE) <= start < len(BEFORE) + len(text)]
    if len(starts) <= length:
        return None
    return describe_cut(text, starts, length)


def _require(tokenizer: Any | None) -> None:
    if tokenizer is None:
        raise CheckpointError("the checkpoint lacks a tokenizer, so prompts cannot be read; download it again")


def _whole(prompt: str, still: bool = False) -> str:
    return (BEFORE_STILL if still else BEFORE) + LEADING_NEWLINES.sub("", prompt) + AFTER


def text_states(encoder: nn.Module, ids: Tensor, mask: Tensor, crop: int) -> list[Tensor]:
    """States (own rows, C) of each prompt, of token ids and mask (B, L), without the first `crop`."""
    # No mask for the encoder: padding is to the right, and it is causal.
    states = encoder(input_ids=ids, use_cache=False).last_hidden_state
    return [row[crop:length] for row, length in zip(states, mask.sum(1).tolist())]


def pooled_states(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """One state a prompt, (B, P), of token ids and mask (B, L)."""
    return encoder(input_ids=ids, attention_mask=mask).pooler_output
