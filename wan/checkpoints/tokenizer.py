"""A tokenizer as its files state it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from wan.checkpoints.file_errors import CheckpointError, clear_errors


def read_tokenizer(folder: Path, kind: type[Any] = PreTrainedTokenizerFast) -> Any:
    """The tokenizer in a folder, which pads and cuts at the end; raises `CheckpointError` if it is damaged.

    kind: the class to read it by, where the folder has no `tokenizer.json`
    """
    # tokenizers raises bare Exception for a damaged file
    with clear_errors(folder):
        return kind.from_pretrained(folder, local_files_only=True, padding_side="right", truncation_side="right")


def check_vocabulary(
    tokenizer: PreTrainedTokenizerFast, vocabulary: int, folder: Path, needed: Iterable[str] = ()
) -> None:
    """Raise `CheckpointError` unless a text encoder has states of all tokens, and the tokenizer has those needed."""
    if len(tokenizer) > vocabulary or not tokenizer.get_vocab().keys() >= set(needed):
        raise CheckpointError(
            f"{folder} does not belong to this text encoder of {vocabulary} tokens; download it again"
        )
