"""Tasks, as the published programs name them: which kind of checkpoint each is for. Imports nothing heavy."""

from __future__ import annotations

from typing import NamedTuple


class Task(NamedTuple):
    """kind: of checkpoints, as `kind` of the settings has it; checkpoint: the hub id of the one that it picks.

    small: of the one that it picks for videos of `SMALL_SIZES`, where that is another
    """

    kind: str
    checkpoint: str
    small: str | None = None


SMALL_SIZES = ("832*480", "480*832")
TASKS = {
    "t2v-14B": Task("t2v", "Wan-AI/Wan2.1-T2V-14B"),
    "t2v-1.3B": Task("t2v", "Wan-AI/Wan2.1-T2V-1.3B"),
    # A picture is a video of one frame, by the same checkpoint.
    "t2i-14B": Task("t2v", "Wan-AI/Wan2.1-T2V-14B"),
    "i2v-14B": Task("i2v", "Wan-AI/Wan2.1-I2V-14B-720P", small="Wan-AI/Wan2.1-I2V-14B-480P"),
    "flf2v-14B": Task("flf2v", "Wan-AI/Wan2.1-FLF2V-14B-720P"),
    "vace-1.3B": Task("vace", "Wan-AI/Wan2.1-VACE-1.3B"),
    "vace-14B": Task("vace", "Wan-AI/Wan2.1-VACE-14B"),
    "t2v-A14B": Task("t2v-A14B", "Wan-AI/Wan2.2-T2V-A14B"),
    "i2v-A14B": Task("i2v-A14B", "Wan-AI/Wan2.2-I2V-A14B"),
    "ti2v-5B": Task("ti2v-5B", "Wan-AI/Wan2.2-TI2V-5B"),
}


# What the repositories of weights that were tuned for sparse attention begin with, and their kind.
TUNED = ("ai-forever/Wan2.1-T2V-14B-NABLA", "t2v")


def kind_on_hub(hub_id: str) -> str | None:
    """The kind of a checkpoint that one of the tasks picks, or that was tuned from one; None for all others."""
    if hub_id.startswith(TUNED[0]):
        return TUNED[1]
    return next((task.kind for task in TASKS.values() if hub_id in (task.checkpoint, task.small)), None)


def checkpoint_of(task: str, size: str | None = None) -> str:
    """The hub id of the checkpoint that a task picks, for a size as --size has it."""
    picked = TASKS[task]
    is_small = size is not None and size.replace("x", "*") in SMALL_SIZES
    return picked.small if is_small and picked.small is not None else picked.checkpoint
