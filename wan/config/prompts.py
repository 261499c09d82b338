"""What a video shows, in words: prompts as they are checked, and cleaned for a text encoder."""

from __future__ import annotations

import html
import re

import ftfy

from nabla import InputError
from wan.config.checks import check_text


def clean_prompt(prompt: str) -> str:
    """Mend broken encodings, resolve HTML entities twice, fold white space, as was done for training."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


def check_prompt(prompt: object, where: str = "with --prompt") -> None:
    """Raise `InputError` unless a prompt says something; where: it can be given."""
    text = prompt or ""
    check_text("prompt", text)
    assert isinstance(text, str)
    if not clean_prompt(text):
        raise InputError(f"the prompt is empty; say what the video should show {where}")


def check_expanded(expand: object, text: object) -> None:
    """Raise `InputError` unless `expand_prompt` is true or false, and a text that stands for its result fits it."""
    if not isinstance(expand, bool):
        raise InputError(f"expand_prompt {expand!r} is neither true nor false")
    if text is None:
        return
    check_text("expanded_prompt", text)
    if not str(text).strip():
        raise InputError("expanded_prompt is empty; leave it out to have the prompt expanded")
    if not expand:
        raise InputError("expanded_prompt is used where expand_prompt is true; set that, or leave the text out")
