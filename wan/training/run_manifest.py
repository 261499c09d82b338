"""What a run began with, for its continuation: the settings, and fingerprints of the files that it reads again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
import yaml
from safetensors import safe_open

from nabla import InputError
from wan.checkpoints.file_errors import read_json_object
from wan.config.settings import read_settings
from wan.files.atomic import atomic_path
from wan.models.checkpoint import Checkpoint
from wan.models.wan import components
from wan.training.config import CHANGEABLE, TrainingSettings
from wan.training.data import Clips
from wan.training.schema import check_continues

log = logging.getLogger("wan")

SETTINGS_FILE, INPUTS_FILE = "settings.yaml", "inputs.json"


def fingerprint(files: Iterable[Path]) -> str:
    """Of safetensors in their order, whatever their folder: names, shapes, metadata, middles of tensors.

    A middle is a row, read from one place: weights that were trained on, and clips that were made anew, differ in it.
    """
    digest = hashlib.sha256()
    for path in files:
        with safe_open(path, "pt") as file:
            digest.update(f"{path.name} {sorted((file.metadata() or {}).items())}".encode())
            for name in sorted(file.keys()):
                tensor = file.get_slice(name)
                shape = tensor.get_shape()
                middle = tensor[tuple(slice(size // 2, size // 2 + 1) for size in shape[:-1])].flatten()
                digest.update(f"{name} {shape} {middle.dtype}".encode())
                digest.update(middle.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def run_inputs(
    settings: TrainingSettings, base: Checkpoint, clips: Clips, validation: Clips | None
) -> dict[str, dict[str, str]]:
    """Of each setting that names what a continuation reads again: where that lies, and its fingerprint.

    A checkpoint's weights are read again beneath LoRA and as the teacher of `distill`.
    """
    inputs = {"data.train": {"lies": ", ".join(settings.data.train), "is": fingerprint(clips.files)}}
    if validation is not None:
        inputs["data.validation"] = {"lies": settings.data.validation, "is": fingerprint(validation.files)}
    if settings.lora is not None or settings.mode == "distill":
        weights = components.transformer_component(base).weights
        inputs["checkpoint"] = {"lies": str(base.folder), "is": fingerprint(weights.files)}
    return inputs


def write_manifest(folder: Path, settings: TrainingSettings, inputs: dict[str, dict[str, str]]) -> None:
    with atomic_path(folder / SETTINGS_FILE) as partial:
        partial.write_text(yaml.safe_dump(settings.to_dict(), allow_unicode=True, sort_keys=False))
    with atomic_path(folder / INPUTS_FILE) as partial:
        partial.write_text(json.dumps(inputs, indent=2, ensure_ascii=False))


def check_manifest(folder: Path, settings: TrainingSettings, inputs: dict[str, dict[str, str]]) -> None:
    """Raise `InputError` unless a run in a folder goes on exactly with these settings and inputs.

    The same weights may lie in another folder: a link that led to them may lead to others by now.
    """
    earlier = TrainingSettings.from_dict(read_settings(folder / SETTINGS_FILE))
    path = folder / INPUTS_FILE
    if not path.is_file():
        log.warning("warning: %s is missing; data and checkpoint are taken for those that the run began with", path)
    before = read_json_object(path, "choose another out") if path.is_file() else {}
    same = {name for name in before if inputs.get(name, {}).get("is") == before[name]["is"]}
    check_continues(settings, earlier, (*CHANGEABLE, *(same & {"checkpoint"})))
    for name in sorted(before.keys() - same):
        then, now = before[name]["lies"], inputs[name]["lies"]
        raise InputError(
            f"{settings.out} holds a run with another {name} than there is now: it began with what was in {then}, and "
            f"{now} holds something else; give what it began with, or choose another out"
        )
