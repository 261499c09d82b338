"""Checkpoints on this machine: the small one, and those of the configs in the hub's cache. Nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from wan.checkpoints.weights import CheckpointError, WeightFiles
from wan.config.settings import CONFIG_FOLDER, read_settings
from wan.models.wan.checkpoint import CONFIGURATIONS, Checkpoint
from wan.models.wan.components import MODEL_STEM, TEXT_ENCODER_FILE, TEXT_ENCODER_STEM, VAE_FILE
from wan.tools.doctor.packages import IS_SOURCE, ROOT

SHIPPED = Path("checkpoints/wan-shapes")
OTHER_HUB_NAMES = ("Wan-AI/Wan2.1-T2V-1.3B",)


@dataclass(frozen=True)
class Found:
    """problem: what it lacks, or \"\""""

    name: str
    folder: str
    problem: str


def checkpoints() -> tuple[Found, ...]:
    """Those that are there, first the one that comes with the program's source."""
    folder = ROOT / SHIPPED
    shipped = [Found(str(SHIPPED), str(folder), _lack(folder))] if IS_SOURCE else []
    return *shipped, *(found for name in hub_names() if (found := _cached(name)) is not None)


def hub_names() -> list[str]:
    """The checkpoints that the configs name."""
    named = (read_settings(file).get("checkpoint") for file in sorted(CONFIG_FOLDER.glob("*.yaml")))
    return list(dict.fromkeys([*(name for name in named if name), *OTHER_HUB_NAMES]))


def _cached(name: str) -> Found | None:
    try:
        folder = Path(snapshot_download(name, allow_patterns=CONFIGURATIONS, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return Found(name, str(folder), _lack(folder))


def _lack(folder: Path) -> str:
    """What a checkpoint's folder lacks, in one line."""
    try:
        checkpoint = Checkpoint.open(folder)
        parts = {".": MODEL_STEM}
        if not checkpoint.published:
            parts = {"transformer": MODEL_STEM, "vae": MODEL_STEM, "text_encoder": TEXT_ENCODER_STEM}
        for where, stem in parts.items():
            WeightFiles.find(folder / where, stem)
        for file in (VAE_FILE, TEXT_ENCODER_FILE) if checkpoint.published else ():
            if not (folder / file).is_file():
                return f"{file} is missing"
        if not (checkpoint.tokenizer_folder / "tokenizer.json").is_file():
            return "without a tokenizer, so it cannot read prompts"
    except CheckpointError as error:
        return str(error)
    return ""
