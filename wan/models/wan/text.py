"""Prompts to token ids, and text states to the rows that the transformer was trained with."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nabla import InputError
from wan.config.prompts import clean_prompt

# Of a text in a message.
WORDS_SHOWN, LETTERS_SHOWN = 8, 60


def tokenize(tokenizer: Any, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B, length) int64 each, of prompts cleaned as in training; too long ones are cut."""
    tokens = tokenizer(
        [clean_prompt(prompt) for prompt in prompts],
        padding="max_length",
        truncation=True,
        max_length=length,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return tokens.input_ids, tokens.attention_mask


def cut_note(tokenizer: Any, prompt: str, length: int) -> str | None:
    """A line if a prompt has more tokens than `tokenize` takes: how many, how many are taken, and what is cut off."""
    text = clean_prompt(prompt)
    special = tokenizer.num_special_tokens_to_add()
    # The tokenizer's own warning says nothing of what is cut.
    starts = [start for start, _ in tokenizer(text, return_offsets_mapping=True, verbose=False).offset_mapping]
    if len(starts) <= length:
        return None
    taken = max(length - special, 0)
    words = " ".join(text[starts[taken] :].split()[:WORDS_SHOWN])[:LETTERS_SHOWN]
    return (
        f"the text {text[:LETTERS_SHOWN] + '...'!r} has {len(starts) - special} tokens, of which the text encoder "
        f"takes {taken}: cut off are {words + '...'!r}; say the important first, or shorten it"
    )


def pad_rows(text: Tensor, length: int) -> Tensor:
    """Text states (B, L, C) with zero rows added up to (B, length, C); raises `InputError` if there are more."""
    if text.shape[1] > length:
        raise InputError(f"text states of {text.shape[1]} rows are too long; the transformer takes up to {length}")
    # F.pad counts axes from the last: none of the channels, at the end of the rows.
    return F.pad(text, (0, 0, 0, length - text.shape[1]))


def pad_text(_: nn.Module, args: tuple, kwargs: dict[str, Any], length: int) -> tuple[tuple, dict[str, Any]]:
    """A forward pre-hook for a transformer that applies `pad_rows` to its text states."""
    # diffusers' order: latents, timestep, text states; or all by name.
    if len(args) > 2:
        return (*args[:2], pad_rows(args[2], length), *args[3:]), kwargs
    return args, kwargs | {"encoder_hidden_states": pad_rows(kwargs["encoder_hidden_states"], length)}
