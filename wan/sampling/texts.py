"""Text on its way to a transformer: states padded to the rows that it sees, and the line for a prompt that is cut."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import torch.nn.functional as F
from torch import Tensor

from nabla import InputError
from wan.config.checks import guide_scale_text

log = logging.getLogger("wan")

# Of a text in a message.
WORDS_SHOWN, LETTERS_SHOWN = 8, 60


def pad_rows(text: Tensor, length: int) -> Tensor:
    """Text states (..., L, C) with zero rows added up to (..., length, C); raises `InputError` if there are more."""
    rows = text.shape[-2]
    if rows > length:
        raise InputError(f"text states of {rows} rows are too long; the transformer takes up to {length}")
    # F.pad counts axes from the last: none of the channels, at the end of the rows.
    return F.pad(text, (0, 0, 0, length - rows))


def require_negative(text: Tensor | None, guide_scale: float | tuple[float, float]) -> Tensor:
    """Negative text states, without which `InputError` is raised."""
    if text is None:
        raise InputError(
            f"guide_scale {guide_scale_text(guide_scale)} needs negative text states; give them, or set it to 1"
        )
    return text


def describe_cut(text: str, starts: Sequence[int], taken: int) -> str:
    """A line for a text of which a text encoder takes so many tokens: how many there are, and what is cut off.

    starts: of each token, the place of its first letter
    """
    words = " ".join(text[starts[taken] :].split()[:WORDS_SHOWN])[:LETTERS_SHOWN]
    return (
        f"the text {text[:LETTERS_SHOWN] + '...'!r} has {len(starts)} tokens, of which the text encoder "
        f"takes {taken}: cut off are {words + '...'!r}; say the important first, or shorten it"
    )


class CutNotes:
    """What is said of prompts of which a text encoder takes only a part.

    note: the line for a prompt, None for one that is taken whole
    """

    def __init__(self, note: Callable[[str], str | None]):
        self._note = note
        self._said: set[str] = set()

    def of(self, *prompts: str) -> tuple[str, ...]:
        """The lines for those that are cut."""
        return tuple(line for line in map(self._note, prompts) if line is not None)

    def warn(self, prompts: Iterable[str]) -> None:
        """Log the line for each that is cut, once in a pipeline's life."""
        for prompt in prompts:
            line = None if prompt in self._said else self._note(prompt)
            if line is not None:
                self._said.add(prompt)
                log.warning("warning: %s", line)
