"""Shards of prepared clips in a folder: their names, what they say of their clips, and whether all are there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from nabla import InputError
from nabla.checks import is_count
from wan.checkpoints.file_errors import CheckpointError, read_json_object
from wan.files.plain_data import parse_json

MANIFEST_FILE = "prepared.json"
# Of the manifest: whose models made the clips. Without it those of `FIRST_FAMILY`.
FAMILY_KEY = "family"
# What for, where that differs within the family, and the tensors that each clip has beside its latents and caption.
KIND_KEY, BESIDE_KEY = "prepared_for", "beside"
NULL_CAPTION_FILE = "dropped.safetensors"
SHARD_NAME = "shard-{:06d}.safetensors"
# Of a shard's metadata, whose keys safetensors writes in any order: only one makes the same file of the same data.
SHARD_METADATA_KEY = "samples"
SHARDS = "shard-*.safetensors"


class Clip(NamedTuple):
    """A clip in a shard. size: (frames, height, width) of its latents; rows: of its text states."""

    file: Path
    index: int
    caption: str
    size: tuple[int, int, int]
    rows: int


def list_shards(folder: Path) -> list[tuple[int, Path]]:
    """The shards of a folder by number."""
    return [(int(path.stem.rpartition("-")[2]), path) for path in sorted(folder.glob(SHARDS))]


def read_shard_metadata(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What a shard says of its clips, and of the samples that could not be used."""
    with _reading(path):
        with safe_open(path, "pt") as file:
            metadata = parse_json(file.metadata()[SHARD_METADATA_KEY])
        clips, skipped = metadata["clips"], metadata["skipped"]
        for sample in (*clips, *skipped):
            if not is_count(sample["index"]):
                raise ValueError("a sample has no number")
        if not all(isinstance(clip["caption"], str) for clip in clips):
            raise ValueError("a caption is no text")
        return clips, skipped


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what a damaged or foreign shard makes of reading it into one line."""
    try:
        yield
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove it and prepare the data again") from None


def list_clips(folder: Path, also: Iterable[str] = ()) -> list[Clip]:
    """The clips of all shards of a folder, in order, without reading tensors.

    also: names of tensors that each has beside its latents and text
    """
    clips: list[Clip] = []
    names = "latents", "text", *also
    for _, path in list_shards(folder):
        written, _ = read_shard_metadata(path)
        with _reading(path), safe_open(path, "pt") as file:
            for clip in written:
                # Slices tell their shapes from the file's header, and (C, T, h, w) and (L, C) are the only ones
                # allowed.
                latents, text, *_ = (file.get_slice(f"{clip['index']}.{name}").get_shape() for name in names)
                if (len(latents), len(text)) != (4, 2):
                    raise ValueError(f"sample {clip['index']} has latents of {latents} and text of {text}")
                clips.append(Clip(path, clip["index"], clip["caption"], tuple(latents[1:]), text[0]))
    return clips


def check_shards(folder: Path) -> dict[str, Any]:
    """A folder's manifest. Raises `InputError` unless the folder holds all shards of the dataset that it names."""
    manifest = read_json_object(folder / MANIFEST_FILE, "prepare the data again, into another folder")
    there = {path.name for path in folder.glob(SHARDS)}
    count, size = manifest.get("samples"), manifest.get("clips_per_shard")
    # Of a dataset without a length, the shards before the last are known.
    shards = -(-count // size) if is_count(count) and is_count(size) and size else len(there)
    missing = [name for name in map(SHARD_NAME.format, range(shards)) if name not in there]
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of its {shards} shards, the first {missing[0]}; start "
            "scripts/prepare_data.py again in the same way to make them"
        )
    return manifest


def read_null_caption(path: Path) -> dict[str, Tensor]:
    """The tensors of a caption by name, among them its text states, (L, C)."""
    try:
        states = load_file(path)
        # Asked for here, where what is missing is said.
        return {"text": states["text"]} | states
    except (SafetensorError, KeyError) as error:
        raise InputError(
            f"{path} is damaged ({error}); remove it and start scripts/prepare_data.py again in the same way"
        ) from None
