"""What a run began with, for its continuation: the settings, and fingerprints of the files that it reads again."""

from __future__ import annotations

import logging
from pathlib import Path

import yaml

from nabla import InputError
from wan.checkpoints.file_errors import read_json_object
from wan.checkpoints.fingerprints import fingerprint_files
from wan.config.config_files import read_settings
from wan.files.atomic import atomic_path
from wan.files.json_files import write_json
from wan.models.checkpoint import Checkpoint
from wan.training.clips import Clips
from wan.training.config import CHANGEABLE, TrainingSettings
from wan.training.schema import check_continues

log = logging.getLogger("wan")

SETTINGS_FILE, INPUTS_FILE = "settings.yaml", "inputs.json"


def run_inputs(
    settings: TrainingSettings, base: Checkpoint, clips: Clips, validation: Clips | None
) -> dict[str, dict[str, str]]:
    """Of each setting that names what a continuation reads again: where that lies, and its fingerprint.

    A checkpoint's weights are read again beneath LoRA and as the teacher of `distill`.
    """
    inputs = {"data.train": {"lies": ", ".join(settings.data.train), "is": fingerprint_files(clips.files)}}
    if validation is not None:
        inputs["data.validation"] = {"lies": settings.data.validation, "is": fingerprint_files(validation.files)}
    if settings.lora is not None or settings.mode == "distill":
        weights = base.family.load_training().component(base, settings.expert).weights
        inputs["checkpoint"] = {"lies": str(base.folder), "is": fingerprint_files(weights.files)}
    return inputs


def write_manifest(folder: Path, settings: TrainingSettings, inputs: dict[str, dict[str, str]]) -> None:
    with atomic_path(folder / SETTINGS_FILE) as partial:
        partial.write_text(yaml.safe_dump(settings.to_dict(), allow_unicode=True, sort_keys=False))
    write_json(folder / INPUTS_FILE, inputs)


def check_manifest(folder: Path, settings: TrainingSettings, inputs: dict[str, dict[str, str]]) -> None:
    """Raise `InputError` unless a run in a folder goes on exactly with these settings and inputs.

    The same weights may lie in another folder: a link that led to them may lead to others by now.
    """
    earlier = TrainingSettings.from_dict(read_settings(folder / SETTINGS_FILE))
    path = folder / INPUTS_FILE
    if not path.is_file():
        log.warning("warning: %s is missing; data and checkpoint are taken for those that the run began with", path)
    before = read_json_object(path, "choose another out") if path.is_file() else {}
    # Inputs are the same if their fingerprints are, wherever they lie.
    same = {name for name in before if inputs.get(name, {}).get("is") == before[name]["is"]}
    # Another `checkpoint` will do where its weights are the same.
    check_continues(settings, earlier, (*CHANGEABLE, *(same & {"checkpoint"})))
    for name in sorted(before.keys() - same):
        then, now = before[name]["lies"], inputs[name]["lies"]
        raise InputError(
            f"{settings.out} holds a run with another {name} than there is now: it began with what was in {then}, and "
            f"{now} holds something else; give what it began with, or choose another out"
        )
