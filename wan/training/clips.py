"""The prepared clips of folders, as training and validation take them."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from nabla import InputError
from wan.config.geometry import Geometry
from wan.models.checkpoint import Checkpoint
from wan.models.family import Family
from wan.models.registry import FAMILIES, FIRST_FAMILY
from wan.models.training import Texts, TrainingFacts
from wan.training.shards import (
    BESIDE_KEY,
    FAMILY_KEY,
    KIND_KEY,
    MANIFEST_FILE,
    NULL_CAPTION_FILE,
    Clip,
    check_shards,
    list_clips,
    read_null_caption,
)

# To open a shard takes as long as to read many small clips; an open one is a mapping of the file and no file handle.
OPEN_SHARDS = 1024
# What a folder's manifest names by fingerprints, and clips that are trained on together must share.
MADE_BY = ("vae", "text_encoder", "image_encoder")


class PreparedFolder(NamedTuple):
    """A folder, its manifest, and the states of the null caption, that of a clip without its own."""

    folder: str
    manifest: dict[str, Any]
    null_states: dict[str, Tensor]

    @property
    def family(self) -> Family:
        """That of the models which the clips were prepared with."""
        name = self.manifest.get(FAMILY_KEY, FIRST_FAMILY.name)
        if (own := next((family for family in FAMILIES if family.name == name), None)) is None:
            known = ", ".join(family.name for family in FAMILIES)
            raise InputError(f"{self.folder}/{MANIFEST_FILE} names the family {name!r}; known are {known}")
        return own

    @property
    def prepared_for(self) -> str:
        """What for, where that differs within the family."""
        return str(self.manifest.get(KIND_KEY, ""))

    @property
    def beside(self) -> tuple[str, ...]:
        """Names of the tensors that each clip has beside its latents and its caption."""
        return tuple(self.manifest.get(BESIDE_KEY, ()))

    def check_like(self, other: PreparedFolder) -> None:
        """Raise `InputError` unless both were made by the same models, as far as they say."""
        if self.prepared_for != other.prepared_for or self.beside != other.beside:
            raise InputError(
                f"{self.folder} and {other.folder} were prepared for other kinds of checkpoints, "
                f"{self.prepared_for or 'text to video'} and {other.prepared_for or 'text to video'}; prepare one anew"
            )
        mine, theirs = self.null_states, other.null_states
        if mine.keys() != theirs.keys() or not all(torch.equal(mine[name], theirs[name]) for name in mine):
            raise InputError(
                f"{self.folder} and {other.folder} differ in text encoder or dropped_text; prepare one anew"
            )
        for part in MADE_BY:
            one, two = self.manifest.get(part), other.manifest.get(part)
            # A folder whose manifest lacks fingerprints passes.
            if one != two and None not in (one, two):
                raise InputError(f"{self.folder} and {other.folder} differ in {part}; prepare one anew")


class Clips:
    """The prepared clips of folders, and their null caption; `files` hold both.

    family: that of the models which prepared them
    beside: clips that these must have been prepared like, those of training for a validation's
    Raises `InputError` for a folder that does not hold all that was to be prepared, whole, or not as the first does,
    and for more rows of text than `text_length`.
    """

    def __init__(self, folders: Sequence[str], text_length: int, beside: Clips | None = None):
        self.files: list[Path] = []
        self.clips: list[Clip] = []
        self.text_length = text_length
        first = None if beside is None else beside.first
        for folder in folders:
            path = Path(folder).expanduser()
            if not (path / NULL_CAPTION_FILE).is_file():
                raise InputError(f"{folder} holds no prepared clips; make them with scripts/prepare_data.py")
            own = PreparedFolder(folder, check_shards(path), read_null_caption(path / NULL_CAPTION_FILE))
            found = list_clips(path, also=(*(own.null_states.keys() - {"text"}), *own.beside))
            if not found:
                raise InputError(f"{folder} holds no clips; see why its samples were skipped, and prepare others")
            self.clips += found
            self.files += [path / NULL_CAPTION_FILE, *dict.fromkeys(clip.file for clip in found)]
            first = first or own
            own.check_like(first)
        self.first = first
        self.family = first.family
        self.training = self.family.load_training()
        self._check_lengths()
        # Clips by size, sizes in the order in which they come first: what a seed draws goes by that order.
        self.buckets: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        for number, clip in enumerate(self.clips):
            self.buckets[clip.size].append(number)

    def _check_lengths(self) -> None:
        texts = [(f"{clip.file}, sample {clip.index}", clip.rows) for clip in self.clips]
        texts.append((f"{self.clips[0].file.parent / NULL_CAPTION_FILE}", len(self.first.null_states["text"])))
        if long := [text for text in texts if text[1] > self.text_length]:
            raise InputError(
                f"{long[0][0]}: its text has {long[0][1]} tokens, and the transformer takes {self.text_length} "
                f"(text_len); {len(long) - 1} others are too long as well; raise text_len to "
                f"{max(rows for _, rows in long)}, or prepare the data with a checkpoint of this one, which cuts them"
            )

    def __len__(self) -> int:
        return len(self.clips)

    def load(self, number: int, drops_caption: bool = False) -> tuple[Tensor, Texts]:
        """Float32 latents (C, T, h, w) of a clip, and what guides it as the family's transformer takes it.

        drops_caption: in place of its own caption with the null caption
        """
        clip = self.clips[number]
        file = _opened(clip.file)
        states = dict(self.first.null_states)
        if not drops_caption:
            states = {name: file.get_tensor(f"{clip.index}.{name}") for name in states}
        return file.get_tensor(f"{clip.index}.latents").float(), self.ready(states | self.beside(number))

    def beside(self, number: int) -> dict[str, Tensor]:
        """What is stored of a clip beside its latents and its caption."""
        clip = self.clips[number]
        return {name: _opened(clip.file).get_tensor(f"{clip.index}.{name}") for name in self.first.beside}

    def ready(self, states: Mapping[str, Tensor]) -> Texts:
        """What guides a clip as the family's transformer takes it, of its caption's states, and what is beside its
        latents, as they are stored.
        """
        return self.training.ready(states, self.text_length)

    def check_made_for(self, base: Checkpoint, facts: TrainingFacts) -> None:
        """Raise `InputError` unless the clips were prepared for such a checkpoint, which the facts are of."""
        for theirs, own in (
            (self.family.name, base.family.name),
            (self.first.prepared_for or "text to video", facts.prepared_for or "text to video"),
        ):
            if theirs != own:
                raise InputError(
                    f"{self.first.folder} was prepared for {theirs}, and the checkpoint is of {own}; "
                    "prepare the data with the run's checkpoint"
                )

    def check_fit(self, config: Mapping[str, Any], geometry: Geometry) -> None:
        """Raise `InputError` unless a transformer of the family, of this configuration, takes the clips."""
        takes = self.training.takes(config)
        states = self.first.null_states | self.beside(0)
        columns = ((f"columns of {name} states", states[name].shape[-1], own) for name, own in takes.columns.items())
        for name, own, wanted in (("channels of latents", len(self.load(0)[0]), takes.channels), *columns):
            if own != wanted:
                raise InputError(
                    f"{self.clips[0].file.parent} was prepared with {own} {name}, but the transformer takes {wanted}; "
                    "prepare the data with the run's checkpoint"
                )
        most = takes.positions
        for size, numbers in self.buckets.items():
            if max(geometry.grid_of(size)) > most:
                raise InputError(
                    f"{self.clips[numbers[0]].file}, sample {self.clips[numbers[0]].index}: its latents of {size} are "
                    f"too large for rope_max_seq_len {most}, the positions of the transformer's rotary table"
                )

    def describe(self, number: int) -> str:
        clip: Clip = self.clips[number]
        return f"sample {clip.index} of {clip.file} ({clip.caption!r})"


@functools.lru_cache(OPEN_SHARDS)
def _opened(path: Path) -> safe_open:
    return safe_open(path, "pt")
