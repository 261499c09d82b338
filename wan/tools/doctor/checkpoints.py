"""Checkpoints on this machine: the small one, and those of the configs in the hub's cache. Nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from wan.checkpoints.file_errors import CheckpointError
from wan.config.config_files import CONFIG_FOLDER, read_settings
from wan.models.checkpoint import Checkpoint
from wan.models.registry import FAMILIES
from wan.tools.doctor.packages import IS_SOURCE, ROOT

SHIPPED = Path("checkpoints/wan-shapes")
OTHER_HUB_NAMES = ("Wan-AI/Wan2.1-T2V-1.3B",)


@dataclass(frozen=True)
class LocalCheckpoint:
    """problem: what it lacks, or nothing; kind: of its family's, where that has several; parts: its models"""

    name: str
    folder: str
    problem: str
    kind: str = ""
    parts: tuple[str, ...] = ()


def find_checkpoints(given: str | None = None) -> tuple[LocalCheckpoint, ...]:
    """Those that are there, first one that is given, as a folder, and the one that comes with the program's source."""
    shipped = [look_at(str(SHIPPED), ROOT / SHIPPED)] if IS_SOURCE else []
    named = [] if given is None else [look_at(given, Path(given))]
    return *named, *shipped, *(found for name in hub_names() if (found := _cached(name)) is not None)


def hub_names() -> list[str]:
    """The checkpoints that the configs name."""
    named = (read_settings(file).get("checkpoint") for file in sorted(CONFIG_FOLDER.glob("*.yaml")))
    return list(dict.fromkeys([*(name for name in named if name), *OTHER_HUB_NAMES]))


def _cached(name: str) -> LocalCheckpoint | None:
    try:
        # The small files alone, which are enough to find the folder that the large ones are in.
        patterns = [pattern for family in FAMILIES for pattern in family.hub_files.configurations]
        folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return look_at(name, folder)


def look_at(name: str, folder: Path) -> LocalCheckpoint:
    """What a folder holds, and what it lacks."""
    try:
        checkpoint = Checkpoint.open(folder)
        parts = tuple(files.name for files in checkpoint.component_files)
        return LocalCheckpoint(name, str(folder), _problem_of(checkpoint), checkpoint.layout.kind, parts)
    except CheckpointError as error:
        return LocalCheckpoint(name, str(folder), str(error))


def _problem_of(checkpoint: Checkpoint) -> str:
    """What a checkpoint lacks, in one line; raises `CheckpointError` for files that cannot be used."""
    # What others have is asked for when a run needs it, and downloaded then.
    elsewhere = {one.name for one in checkpoint.family.companions if checkpoint.published}
    for files in checkpoint.component_files:
        if files.name in elsewhere:
            continue
        # A pickle takes long to open.
        if not (checkpoint.published and files.is_one_file):
            checkpoint.weights_of(files.name)
        elif not (checkpoint.folder / files.published).is_file():
            return f"{files.published} is missing"
    if not elsewhere and not all(map(checkpoint.tokenizer_files, checkpoint.family.tokenizers)):
        return "without a tokenizer, so it cannot read prompts"
    return ""
