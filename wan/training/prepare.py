"""Latents and text states of a dataset, computed once into shards that training reads, by one process or several."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from nabla import InputError
from wan.checkpoints.file_errors import read_json_object
from wan.files.atomic import atomic_path
from wan.files.json_files import write_json
from wan.models.registry import FIRST_FAMILY
from wan.training.data_workers import load_items
from wan.training.encoder import Encoder
from wan.training.prepare_settings import PrepareSettings
from wan.training.samples import CheckedDataset, Sample, SequentialDataset
from wan.training.shards import (
    BESIDE_KEY,
    FAMILY_KEY,
    KIND_KEY,
    MANIFEST_FILE,
    NULL_CAPTION_FILE,
    SHARD_METADATA_KEY,
    SHARD_NAME,
    list_shards,
    read_shard_metadata,
)

log = logging.getLogger("wan")

# What fingerprints in the manifest are of, in words.
FINGERPRINTS = {
    "captions": "other captions",
    "files": "files of other sizes or times of change",
    "vae": "another VAE",
    "text_encoder": "another text encoder, tokenizer or text_len",
    "image_encoder": "another image encoder",
}


class PreparedCounts(NamedTuple):
    """How many samples of a dataset stand in its shards, and how many could not be used."""

    clips: int
    skipped: int


def prepare(
    source: Any, settings: PrepareSettings, encoder: Encoder, rank: int = 0, processes: int = 1
) -> PreparedCounts:
    """Write the shards of a dataset that are not there yet, those that fall to this one of several processes.

    source: indexable, giving (uint8 video (frames, H, W, 3), caption), or any iterable of such pairs; if it has
        `fingerprints`, as `VideoFolder` has, a start with others is refused
    Bad samples are named in the log, and in the shard that they would stand in; returned are the counts of all shards
    that are this process's. Raises `InputError` if the folder holds shards that were made otherwise.
    """
    out, size = Path(settings.out).expanduser(), settings.clips_per_shard
    is_counted = hasattr(source, "__len__")
    manifest = settings.what_decides() | {"samples": len(source) if is_counted else None}
    # What the shards are made of, beside the settings; without fingerprints a change of it goes unnoticed.
    manifest |= source.fingerprints() if hasattr(source, "fingerprints") else {}
    manifest |= encoder.fingerprints
    if encoder.family.name != FIRST_FAMILY.name:
        manifest[FAMILY_KEY] = encoder.family.name
    if encoder.facts.prepared_for:
        manifest |= {KIND_KEY: encoder.facts.prepared_for, BESIDE_KEY: list(encoder.facts.beside)}
    _begin(out, manifest, settings, encoder, is_leader=rank == 0)
    if not hasattr(source, "__getitem__"):
        source = SequentialDataset(source)
        if settings.workers:
            raise InputError(f"workers {settings.workers}: a dataset that cannot be indexed is read by one; set 0")
    # Shards are assigned in turn, by their numbers: processes need not hear of each other.
    own = range(rank, math.ceil(len(source) / size), processes) if is_counted else itertools.count(rank, processes)
    # The last of something uncounted may have been cut short, and more have come since.
    least = 0 if is_counted else size
    missing = (shard for shard in own if not _is_whole(out / SHARD_NAME.format(shard), least))
    indices = (index for shard in missing for index in range(shard * size, (shard + 1) * size))
    checked = CheckedDataset(source, encoder.geometry, encoder.facts.least_frames)
    with contextlib.closing(load_items(checked, indices, settings.workers)) as read_samples:
        # What has no length ends with the first None; workers may have read a few more beyond.
        samples = itertools.takewhile(lambda sample: sample is not None, read_samples)
        # A group ends, and its shard is written, when a sample of another shard comes.
        for shard, group in itertools.groupby(samples, lambda sample: sample.index // size):
            _write_shard(out / SHARD_NAME.format(shard), group, encoder, settings)
    counts = [read_shard_metadata(path) for number, path in list_shards(out) if number % processes == rank]
    return PreparedCounts(sum(len(clips) for clips, _ in counts), sum(len(skipped) for _, skipped in counts))


def _begin(out: Path, manifest: dict[str, Any], settings: PrepareSettings, encoder: Encoder, is_leader: bool) -> None:
    """Make the folder, say in it what its shards are made of, and encode the text of clips without their own."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out {out} cannot be made ({error.strerror}); choose another") from None
    path = out / MANIFEST_FILE
    # The first process may not have written it yet, to whom the others' would be equal.
    earlier = read_json_object(path, "choose another out") if path.is_file() else manifest
    # Without a word of them they are these.
    silent = {FAMILY_KEY: FIRST_FAMILY.name, KIND_KEY: ""}
    _check_same(out, silent | earlier, silent | manifest)
    if not is_leader:
        return
    if unknown := sorted(manifest.keys() - earlier.keys()):
        log.warning("warning: %s does not tell %s; they are taken to be the same as before", path, ", ".join(unknown))
    if not path.is_file():
        write_json(path, manifest)
    if not (out / NULL_CAPTION_FILE).is_file():
        with atomic_path(out / NULL_CAPTION_FILE) as partial:
            for note in encoder.cut_notes([settings.dropped_text]):
                log.warning("warning: dropped_text: %s", note)
            (states,) = encoder.text([settings.dropped_text])
            dtype = getattr(torch, settings.dtype)
            save_file({name: state.to(dtype).contiguous() for name, state in states.items()}, partial)


def _check_same(out: Path, earlier: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Raise `InputError` if shards were made otherwise than now would be; a manifest may lack fingerprints."""
    for name, before in earlier.items():
        now = manifest.get(name)
        if before == now:
            continue
        if name == "samples":
            raise InputError(
                f"{out} was prepared of {before} samples, and there are {now} now; choose another out, or remove it, "
                "to make all anew, or prepare the new ones alone elsewhere: training takes several folders"
            )
        said = f"{name} {before!r}, not {now!r}"
        made = f"made with {FINGERPRINTS[name]}" if name in FINGERPRINTS else f"made with other settings: {said}"
        raise InputError(f"{out} holds shards that were {made}; choose another out, or remove it to make all anew")


def _write_shard(path: Path, samples: Iterable[Sample], encoder: Encoder, settings: PrepareSettings) -> None:
    """Encode samples as they come, those of one shape together, so that others are read meanwhile."""
    tensors: dict[str, Tensor] = {}
    clips, skipped = [], []
    # Samples by the shape of their video, until there are enough for a batch.
    waiting = defaultdict(list)
    dtype = getattr(torch, settings.dtype)

    def encode_all(group: list[Sample]) -> None:
        videos = torch.stack([sample.video for sample in group])
        latents, beside = encoder.latents(videos).to(dtype).cpu(), encoder.beside(videos)
        texts = encoder.text([sample.caption for sample in group])
        for sample, clip, given, states in zip(group, latents, beside, texts):
            tensors[f"{sample.index}.latents"] = clip.contiguous()
            for name, state in (given | states).items():
                tensors[f"{sample.index}.{name}"] = state.to(dtype).contiguous()

    for sample in samples:
        if sample.reason:
            log.warning("warning: sample %d is skipped: %s", sample.index, sample.reason)
            skipped.append({"index": sample.index, "reason": sample.reason})
            continue
        # In the dataset's order, whatever is encoded first.
        clips.append({"index": sample.index, "caption": sample.caption})
        waiting[sample.video.shape].append(sample)
        if len(waiting[sample.video.shape]) == settings.batch:
            encode_all(waiting.pop(sample.video.shape))
    for group in waiting.values():
        encode_all(group)
    with atomic_path(path) as partial:
        save_file(tensors, partial, {SHARD_METADATA_KEY: json.dumps({"clips": clips, "skipped": skipped})})
    log.info("%s: %d clips, %d skipped", path.name, len(clips), len(skipped))
    if cut := encoder.cut_notes([clip["caption"] for clip in clips]):
        log.warning("warning: %s: captions that are too long: %d of %d; %s", path.name, len(cut), len(clips), cut[0])


def _is_whole(path: Path, least: int) -> bool:
    return path.is_file() and (not least or sum(map(len, read_shard_metadata(path))) >= least)
