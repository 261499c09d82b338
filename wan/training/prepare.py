"""Latents and text states of a dataset, computed once into shards that training reads, by one process or several."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nabla import InputError
from nabla.config import is_count
from wan.checkpoints.file_errors import CheckpointError, read_json_object
from wan.files.atomic import atomic_path
from wan.files.plain_data import parse_json
from wan.models.checkpoint import Checkpoint
from wan.models.wan import components
from wan.models.wan.latents import encode
from wan.models.wan.text import cut_note, tokenize
from wan.models.wan.vae import speed_up_encoder
from wan.models.wan.whole_clips import posterior, take_whole_clips
from wan.training.data_workers import load_items
from wan.training.prepare_settings import PrepareSettings
from wan.training.samples import CheckedDataset, Sample, SequentialDataset

log = logging.getLogger("wan")

MANIFEST_FILE = "prepared.json"
NULL_CAPTION_FILE = "dropped.safetensors"
SHARD_NAME = "shard-{:06d}.safetensors"
# Of a shard's metadata, whose keys safetensors writes in any order: only one makes the same file of the same data.
SHARD_METADATA_KEY = "samples"
SHARDS = "shard-*.safetensors"
# Values of each weight that a fingerprint takes: those of a large text encoder would all take minutes.
FINGERPRINT_VALUES = 4096
# What fingerprints in the manifest are of, in words.
FINGERPRINTS = {
    "captions": "other captions",
    "files": "files of other sizes or times of change",
    "vae": "another VAE",
    "text_encoder": "another text encoder, tokenizer or text_len",
}


class Encoder:
    """The VAE, its encoder in `vae_dtype`, text encoder and tokenizer of a checkpoint, which needs no transformer.

    whole_clips: encode clips in one pass rather than by chunks of four frames
    `fingerprints` tells its VAE's encoder and its text encoder with the tokenizer from others.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        vae_dtype: torch.dtype = torch.float32,
        whole_clips: bool = False,
    ):
        checkpoint.require_tokenizer()
        self.device, self.length = device, checkpoint.text_length
        self.vae = components.vae_component(checkpoint).load(torch.float32, device)
        statistics = repr((list(self.vae.config.latents_mean), list(self.vae.config.latents_std)))
        self.fingerprints = {"vae": _fingerprint(statistics.encode(), self.vae.encoder, self.vae.quant_conv)}
        speed_up_encoder(self.vae, vae_dtype)
        self.posterior = posterior if whole_clips else None
        if whole_clips:
            take_whole_clips(self.vae.encoder)
        text_dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.text_encoder = components.text_encoder_component(checkpoint, text_dtype).load(text_dtype, device)
        self.tokenizer = components.load_tokenizer(checkpoint, self.text_encoder.config.vocab_size)
        reading = (checkpoint.tokenizer_folder / "tokenizer.json").read_bytes() + str(self.length).encode()
        self.fingerprints["text_encoder"] = _fingerprint(reading, self.text_encoder)

    @torch.no_grad()
    def latents(self, videos: Tensor) -> Tensor:
        """(B, C, T, h, w) float32 of uint8 videos (B, frames, H, W, 3); raises `InputError` if they overflow."""
        pixels = videos.to(self.device, non_blocking=True).permute(0, 4, 1, 2, 3)
        latents = encode(self.vae, pixels.float() / 127.5 - 1, self.posterior)
        if not latents.isfinite().all():
            raise InputError("the VAE's encoder gives values that are not finite; prepare with vae_dtype float32")
        return latents

    @torch.no_grad()
    def text(self, captions: list[str]) -> list[Tensor]:
        """The states of each caption, (L, C) on the CPU, without the rows past its end."""
        ids, mask = tokenize(self.tokenizer, captions, self.length)
        states = self.text_encoder(ids.to(self.device), mask.to(self.device)).last_hidden_state.cpu()
        return [state[: row.sum()] for state, row in zip(states, mask)]

    def cut_notes(self, captions: list[str]) -> list[str]:
        """A line for each caption that is longer than the text encoder takes."""
        return [note for one in captions if (note := cut_note(self.tokenizer, one, self.length)) is not None]


def _fingerprint(besides: bytes, *models: nn.Module) -> str:
    """Of values of every weight, rounded to what they are in any type and on any device, and of other bytes."""
    digest = hashlib.sha256(besides)
    for model in models:
        for name, weight in model.state_dict().items():
            values = weight.flatten()[:: max(1, weight.numel() // FINGERPRINT_VALUES)].to("cpu", torch.bfloat16)
            digest.update(f"{name} {tuple(weight.shape)}".encode() + values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


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
    manifest |= source.fingerprints() if hasattr(source, "fingerprints") else {}
    manifest |= encoder.fingerprints
    _begin(out, manifest, settings, encoder, is_leader=rank == 0)
    if not hasattr(source, "__getitem__"):
        source = SequentialDataset(source)
        if settings.workers:
            raise InputError(f"workers {settings.workers}: a dataset that cannot be indexed is read by one; set 0")
    own = range(rank, math.ceil(len(source) / size), processes) if is_counted else itertools.count(rank, processes)
    # The last of something uncounted may have been cut short, and more have come since.
    least = 0 if is_counted else size
    missing = (shard for shard in own if not _is_whole(out / SHARD_NAME.format(shard), least))
    indices = (index for shard in missing for index in range(shard * size, (shard + 1) * size))
    with contextlib.closing(load_items(CheckedDataset(source), indices, settings.workers)) as read_samples:
        samples = itertools.takewhile(lambda sample: sample is not None, read_samples)
        for shard, group in itertools.groupby(samples, lambda sample: sample.index // size):
            _write_shard(out / SHARD_NAME.format(shard), group, encoder, settings)
    counts = [_read_shard_metadata(path) for number, path in _shards(out) if number % processes == rank]
    return PreparedCounts(sum(len(clips) for clips, _ in counts), sum(len(skipped) for _, skipped in counts))


def _begin(out: Path, manifest: dict[str, Any], settings: PrepareSettings, encoder: Encoder, is_leader: bool) -> None:
    """Make the folder, say in it what its shards are made of, and encode the text of clips without their own."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out {out} cannot be made ({error.strerror}); choose another") from None
    path = out / MANIFEST_FILE
    earlier = read_json_object(path, "choose another out") if path.is_file() else manifest
    _check_same(out, earlier, manifest)
    if not is_leader:
        return
    if unknown := sorted(manifest.keys() - earlier.keys()):
        log.warning("warning: %s does not tell %s; they are taken to be the same as before", path, ", ".join(unknown))
    if not path.is_file():
        with atomic_path(path) as partial:
            partial.write_text(json.dumps(manifest, indent=2, ensure_ascii=False))
    if not (out / NULL_CAPTION_FILE).is_file():
        with atomic_path(out / NULL_CAPTION_FILE) as partial:
            for note in encoder.cut_notes([settings.dropped_text]):
                log.warning("warning: dropped_text: %s", note)
            (text,) = encoder.text([settings.dropped_text])
            save_file({"text": text.to(getattr(torch, settings.dtype)).contiguous()}, partial)


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
    waiting = defaultdict(list)
    dtype = getattr(torch, settings.dtype)

    def encode_all(group: list[Sample]) -> None:
        latents = encoder.latents(torch.stack([sample.video for sample in group])).to(dtype).cpu()
        texts = encoder.text([sample.caption for sample in group])
        for sample, clip, text in zip(group, latents, texts):
            tensors[f"{sample.index}.latents"] = clip.contiguous()
            tensors[f"{sample.index}.text"] = text.to(dtype).contiguous()

    for sample in samples:
        if sample.reason:
            log.warning("warning: sample %d is skipped: %s", sample.index, sample.reason)
            skipped.append({"index": sample.index, "reason": sample.reason})
            continue
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


def _shards(folder: Path) -> list[tuple[int, Path]]:
    """The shards of a folder by number."""
    return [(int(path.stem.rpartition("-")[2]), path) for path in sorted(folder.glob(SHARDS))]


def _read_shard_metadata(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
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


def _is_whole(path: Path, least: int) -> bool:
    return path.is_file() and (not least or sum(map(len, _read_shard_metadata(path))) >= least)


class Clip(NamedTuple):
    """A clip in a shard. size: (frames, height, width) of its latents; rows: of its text states."""

    file: Path
    index: int
    caption: str
    size: tuple[int, int, int]
    rows: int


def list_clips(folder: Path) -> list[Clip]:
    """The clips of all shards of a folder, in order, without reading tensors."""
    clips: list[Clip] = []
    for _, path in _shards(folder):
        written, _ = _read_shard_metadata(path)
        with _reading(path), safe_open(path, "pt") as file:
            for clip in written:
                latents, text = (file.get_slice(f"{clip['index']}.{name}").get_shape() for name in ("latents", "text"))
                if (len(latents), len(text)) != (4, 2):
                    raise ValueError(f"sample {clip['index']} has latents of {latents} and text of {text}")
                clips.append(Clip(path, clip["index"], clip["caption"], tuple(latents[1:]), text[0]))
    return clips
