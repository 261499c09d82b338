"""Where a checkpoint lies: a directory, or a hub id, which is downloaded; and what a folder is that is none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError

from wan.checkpoints.file_errors import AGAIN, CheckpointError, exists, unreadable
from wan.config.model_settings import LORA_FILE
from wan.files.formats import GGUF, SAFETENSORS

# In diffusers' layout; the published ones have `CONFIG`.
INDEX, CONFIG = "model_index.json", "config.json"
# What helps with a checkpoint that cannot be had.
WITHOUT = (
    "pass --ckpt_dir DIR (checkpoint=DIR to training), or run without it on random weights: "
    "'python scripts/make_random_checkpoint.py --model nano --out DIR'"
)
WEIGHT_ENDINGS = (SAFETENSORS, GGUF, ".pth", ".pt", ".ckpt", ".bin")


def find_folder(name: str | Path) -> Path | None:
    """The folder of this name, None for what may be a hub id; raises `CheckpointError` for any other path."""
    try:
        folder = Path(name).expanduser()
        if not str(name) or not exists(folder):
            return None
        folder = folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        # What no path can be, or a home that is not known: `check_hub_id` says what it should have been.
        return None
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint {name} is a single file; give it as --transformer (transformer: in a config), and with "
            "--ckpt_dir the folder of its base checkpoint, which has the VAE, the text encoder and the tokenizer"
        )
    try:
        os.listdir(folder)
    except OSError as error:
        raise CheckpointError(unreadable(folder, error)) from None
    return folder


def check_hub_id(name: str, what: str = "checkpoint") -> None:
    """Raise `CheckpointError` for what is not of the form owner/name; whether there is such a one is not looked up."""
    parts = name.split("/")
    if name.endswith(WEIGHT_ENDINGS):
        raise CheckpointError(
            f"checkpoint {name!r} is a name of a file of weights, which is not here; --ckpt_dir takes a folder, and "
            "--transformer such a file"
        )
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..") or name.startswith("~"):
        raise CheckpointError(f"{what} {name!r} is neither a directory nor a hub id of the form owner/name")


def download(
    name: str,
    patterns: Sequence[str],
    left_out: Sequence[str] | None = None,
    what: str = "checkpoint",
    remedy: str = WITHOUT,
) -> Path:
    """The folder of the files of a hub id that fit one of the patterns; those that are cached are not had again.

    what, remedy: what it is, and how a folder DIR is given in its place, for messages
    Raises `CheckpointError` for what is no hub id, and if a file cannot be had.
    """
    check_hub_id(name, what)
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=left_out and list(left_out)))
    except (HTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(". ") if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{what} {name} is not a directory here and could not be downloaded ({reason}); get it on a connected "
            f"machine with 'hf download {name} --local-dir DIR' and {remedy}"
        ) from error


def list_files(name: str) -> list[str]:
    """The names of the files of a hub id; none if the hub cannot be asked."""
    try:
        return HfApi().list_repo_files(name)
    except (HTTPError, HFValidationError, OSError, ValueError):
        return []


def check_no_lora(folder: Path) -> None:
    """Raise `CheckpointError` for a folder that training has written a LoRA to."""
    if any(exists(folder / inner / LORA_FILE) for inner in ("", "lora")):
        raise CheckpointError(
            f"{folder} holds a LoRA and no weights of a transformer; give it as --lora, and with --ckpt_dir the "
            "checkpoint that it was trained on"
        )


def explain(folder: Path, landmarks: Iterable[Sequence[str]]) -> CheckpointError:
    """What to say of a folder in which nothing was recognised, nor an index or a configuration found.

    landmarks: of each family, the files that are together only in a checkpoint of its published layout
    """
    # Gone through for every folder, which an iterator would bear once.
    landmarks = list(landmarks)
    # Of a hub id of which no file was wanted there is no folder.
    inside = sorted(folder.iterdir()) if exists(folder) else []
    for inner in inside:
        if exists(inner / INDEX) or any(all(exists(inner / file) for file in files) for files in landmarks):
            return CheckpointError(f"{folder} is the folder above a checkpoint; give {inner}")
    single = [file.name for file in inside if file.suffix in (SAFETENSORS, GGUF)]
    if single and not any(exists(folder / file) for files in landmarks for file in files):
        return CheckpointError(
            f"{folder} has no {CONFIG}, and so is no checkpoint; it holds {single[0]!r}, which may be given as "
            "--transformer with the folder of its base checkpoint as --ckpt_dir"
        )
    return CheckpointError(f"{folder / CONFIG} is missing; {AGAIN}")
