"""Prompts to token ids, and text states to the rows that the transformer was trained with."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from wan.config.prompts import clean_prompt
from wan.sampling.texts import describe_cut, pad_rows


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
    return describe_cut(text, starts[: len(starts) - special], max(length - special, 0))


def pad_text(_: nn.Module, args: tuple, kwargs: dict[str, Any], length: int) -> tuple[tuple, dict[str, Any]]:
    """A forward pre-hook for a transformer that applies `pad_rows` to its text states."""
    # diffusers' order: latents, timestep, text states; or all by name.
    if len(args) > 2:
        return (*args[:2], pad_rows(args[2], length), *args[3:]), kwargs
    return args, kwargs | {"encoder_hidden_states": pad_rows(kwargs["encoder_hidden_states"], length)}
