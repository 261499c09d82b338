"""How a run is split over its processes: by prompts, by guidance branches and by the sequence of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nabla import InputError


@dataclass(frozen=True)
class ParallelLayout:
    """How many ways a run is split: prompts over replicas, guidance branches, and the sequence of tokens."""

    replicas: int = 1
    cfg: int = 1
    ulysses: int = 1

    @property
    def processes_per_video(self) -> int:
        return self.cfg * self.ulysses

    def describe(self) -> str:
        ways = {"replicas": self.replicas, "guidance branches": self.cfg, "ways of the sequence": self.ulysses}
        split = " x ".join(f"{count} {what}" for what, count in ways.items() if count > 1)
        return f"{self.replicas * self.processes_per_video} processes: {split or 'one video'}"


def choose_layout(
    processes: int,
    heads: int,
    guided: bool,
    prompts: int = 1,
    sharded: bool = False,
    replicas: int | None = None,
    cfg: int | None = None,
    ulysses: int | None = None,
) -> ParallelLayout:
    """The layout for so many processes, with what is asked for; the rest is chosen.

    Several prompts go to replicas, which send each other nothing, as far as none is idle at the end, and unless weights
    are sharded over those that share a video. Guidance branches come next, which send least; then the sequence, of at
    most as many ways as heads.
    guided: whether there are two guidance branches that can run apart
    Raises `InputError` if nothing fits.
    """
    asked = {"replicas": replicas, "cfg_size": cfg, "ulysses_size": ulysses}
    _check_sizes(asked, heads, guided)
    found = [
        ParallelLayout(r, c, processes // (r * c))
        for r in ([replicas] if replicas else range(1, min(prompts, processes) + 1))
        for c in ([cfg] if cfg else (1, 2) if guided else (1,))
        if processes % (r * c) == 0 and processes // (r * c) <= heads
    ]
    found = [layout for layout in found if ulysses in (None, layout.ulysses)]
    if not found:
        named = ", ".join(f"{name} {value}" for name, value in asked.items() if value) or "no size asked for"
        raise InputError(
            f"{processes} processes cannot be laid out ({named}): replicas (of {prompts} to make) x cfg_size (up to "
            f"{1 + guided}) x ulysses_size (up to {heads}) must be {processes}; start another number, or change a size"
        )

    def cost(layout: ParallelLayout) -> tuple[int, int, int]:
        # Rounds of videos, by the time that each takes, which grows as fewer processes share one. Where times are
        # equal, more replicas, then more branches, send less.
        time = -(-prompts // layout.replicas) * layout.replicas
        return layout.replicas if sharded else time, -layout.replicas, -layout.cfg

    return min(found, key=cost)


def _check_sizes(asked: Mapping[str, int | None], heads: int, guided: bool) -> None:
    """Raise `InputError` for a size that is wrong whatever the others are."""
    for name, value in asked.items():
        if value is not None and value < 1:
            raise InputError(f"{name} {value} is not a positive integer")
    cfg, ulysses = asked["cfg_size"], asked["ulysses_size"]
    if cfg is not None and cfg > 1 + guided:
        reason = "there are two guidance branches" if guided else "guidance is off, or its branches share masks"
        raise InputError(f"cfg_size {cfg} is too many: {reason}; leave it out")
    if ulysses is not None and ulysses > heads:
        raise InputError(f"ulysses_size {ulysses} is more than the {heads} heads of the model; lower it")
