"""For whoever wants to see an attention at work: how long its parts take, and which blocks it keeps.

Compiled code is a black box to this, all but the custom operators in it, which run as ordinary Python. So each of them
says what it does, and so does `attend` where it is not compiled. Nothing is asked for and nothing costs while nobody
listens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MASK, ATTENTION = "mask", "attention"


class Probe:
    """Hears of each part of an attention; to be subclassed."""

    def run(self, part: str, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a function that is a part of an attention, `MASK` or `ATTENTION`, and return what it does.

        A part may be within one of the same kind.
        """
        return function(*args, **kwargs)

    def see(self, counts: Callable[[], Tensor], blocks: Callable[[Tensor], Tensor]) -> None:
        """Look at the blocks that are attended to.

        counts: gives how many key blocks each query block keeps, (B or 1, heads or 1, N)
        blocks: gives the blocks of heads by their numbers, (n,) int64 -> (B or 1, n, N, N) bool
        """


_listening: Probe | None = None


@contextmanager
def listening(probe: Probe) -> Iterator[None]:
    """Have a probe hear of all attention of this process, in place of another."""
    global _listening
    before, _listening = _listening, probe
    try:
        yield
    finally:
        _listening = before


def run(part: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function as a part of an attention."""
    if torch.compiler.is_compiling() or _listening is None:
        return function(*args, **kwargs)
    return _listening.run(part, function, args, kwargs)


def see(counts: Callable[[], Tensor], blocks: Callable[[Tensor], Tensor]) -> None:
    """Show the blocks that are attended to, see `Probe.see`."""
    if not torch.compiler.is_compiling() and _listening is not None:
        _listening.see(counts, blocks)
