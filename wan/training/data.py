"""Batches of prepared clips: which clips, noise and noise levels a step sees is a function of seed and step alone."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from nabla import InputError
from nabla.config import is_count
from wan.checkpoints.file_errors import read_json_object
from wan.models.wan.geometry import GEOMETRY
from wan.models.wan.text import pad_rows
from wan.training.config import ObjectiveSettings
from wan.training.data_workers import load_items
from wan.training.objective import sigmas_from_quantiles
from wan.training.prepare import MANIFEST_FILE, NULL_CAPTION_FILE, SHARD_NAME, SHARDS, Clip, list_clips

# Streams of random numbers of one seed that must not meet.
ORDER, BUCKET, DRAW, VALIDATION = range(4)
# To open a shard takes as long as to read many small clips; an open one is a mapping of the file and no file handle.
OPEN_SHARDS = 1024
# What a folder's manifest names by fingerprints, and clips that are trained on together must share.
MADE_BY = ("vae", "text_encoder")


class LatentBatch(NamedTuple):
    """latents, noise: (B, C, T, h, w) float32; sigmas: (B,) float32; text: (B, text length, C) float32."""

    latents: Tensor
    noise: Tensor
    sigmas: Tensor
    text: Tensor

    def to(self, device: torch.device) -> LatentBatch:
        return LatentBatch(*(x.to(device, non_blocking=True) for x in self))


class PreparedFolder(NamedTuple):
    """A folder, its manifest, and the text states of the null caption, that of a clip without its own."""

    folder: str
    manifest: dict[str, Any]
    null_caption: Tensor

    def check_like(self, other: PreparedFolder) -> None:
        """Raise `InputError` unless both were made by the same models, as far as they say."""
        if not torch.equal(self.null_caption, other.null_caption):
            raise InputError(
                f"{self.folder} and {other.folder} differ in text encoder or dropped_text; prepare one anew"
            )
        for part in MADE_BY:
            one, two = self.manifest.get(part), other.manifest.get(part)
            if one != two and None not in (one, two):
                raise InputError(f"{self.folder} and {other.folder} differ in {part}; prepare one anew")


class Clips:
    """The prepared clips of folders, and the text states of their null caption; `files` hold both.

    beside: clips that these must have been prepared like, those of training for a validation's
    Raises `InputError` for a folder that does not hold all that was to be prepared, whole, or not as the first does,
    and for more rows of text than `text_length`.
    """

    def __init__(self, folders: Sequence[str], text_length: int, beside: Clips | None = None):
        self.files: list[Path] = []
        self.text_length, self.clips, first = text_length, [], None if beside is None else beside.first
        for folder in folders:
            path = Path(folder).expanduser()
            if not (path / NULL_CAPTION_FILE).is_file():
                raise InputError(f"{folder} holds no prepared clips; make them with scripts/prepare_data.py")
            own = PreparedFolder(folder, check_shards(path), _read_null_caption(path / NULL_CAPTION_FILE))
            found = list_clips(path)
            if not found:
                raise InputError(f"{folder} holds no clips; see why its samples were skipped, and prepare others")
            self.clips += found
            self.files += [path / NULL_CAPTION_FILE, *dict.fromkeys(clip.file for clip in found)]
            first = first or own
            own.check_like(first)
        self.first = first
        self.null_caption = first.null_caption
        self._check_lengths()
        self.buckets: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        for number, clip in enumerate(self.clips):
            self.buckets[clip.size].append(number)

    def _check_lengths(self) -> None:
        texts = [(f"{clip.file}, sample {clip.index}", clip.rows) for clip in self.clips]
        texts.append((f"{self.clips[0].file.parent / NULL_CAPTION_FILE}", len(self.null_caption)))
        if long := [text for text in texts if text[1] > self.text_length]:
            raise InputError(
                f"{long[0][0]}: its text has {long[0][1]} tokens, and the transformer takes {self.text_length} "
                f"(text_len); {len(long) - 1} others are too long as well; raise text_len to "
                f"{max(rows for _, rows in long)}, or prepare the data with a checkpoint of this one, which cuts them"
            )

    def __len__(self) -> int:
        return len(self.clips)

    def load(self, number: int) -> tuple[Tensor, Tensor]:
        """Float32 latents (C, T, h, w) and text states (text length, C) of a clip."""
        clip = self.clips[number]
        file = _opened(clip.file)
        latents, text = (file.get_tensor(f"{clip.index}.{name}") for name in ("latents", "text"))
        return latents.float(), self.padded(text)

    def padded(self, text: Tensor) -> Tensor:
        return pad_rows(text.float()[None], self.text_length)[0]

    def check_fit(self, config: Mapping[str, Any]) -> None:
        """Raise `InputError` unless a transformer of this configuration takes the clips."""
        latents, text = self.load(0)
        for name, own, wanted in (
            ("channels of latents", len(latents), config["in_channels"]),
            ("columns of text states", text.shape[-1], config["text_dim"]),
        ):
            if own != wanted:
                raise InputError(
                    f"{self.clips[0].file.parent} was prepared with {own} {name}, but the transformer takes {wanted}; "
                    "prepare the data with the run's checkpoint"
                )
        most = config["rope_max_seq_len"]
        for size, numbers in self.buckets.items():
            if max(GEOMETRY.grid_of(size)) > most:
                raise InputError(
                    f"{self.clips[numbers[0]].file}, sample {self.clips[numbers[0]].index}: its latents of {size} are "
                    f"too large for rope_max_seq_len {most}; 1024 is Wan's"
                )

    def describe(self, number: int) -> str:
        clip: Clip = self.clips[number]
        return f"sample {clip.index} of {clip.file} ({clip.caption!r})"


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


def _read_null_caption(path: Path) -> Tensor:
    try:
        return load_file(path)["text"]
    except (SafetensorError, KeyError) as error:
        raise InputError(
            f"{path} is damaged ({error}); remove it and start scripts/prepare_data.py again in the same way"
        ) from None


@functools.lru_cache(OPEN_SHARDS)
def _opened(path: Path) -> safe_open:
    return safe_open(path, "pt")


class Draw(NamedTuple):
    """What is random about a clip in a batch."""

    sigma: Tensor
    drops_caption: bool
    generator: torch.Generator


class MicroBatches(Dataset):
    """The micro-batches of one process, by number; those of a step together with other processes' make its batch.

    A batch is of clips of one size. Sizes are drawn as often as they have clips, and each gives its clips in an order
    that is drawn anew whenever all have been seen. What a batch holds does not depend on how it is divided.
    """

    def __init__(
        self,
        clips: Clips,
        objective: ObjectiveSettings,
        seed: int,
        batch_size: int,
        micro_batch: int,
        rank: int = 0,
        processes: int = 1,
    ):
        if batch_size % (micro_batch * processes):
            raise InputError(
                f"batch_size {batch_size} is not a multiple of micro_batch {micro_batch} x {processes} processes"
            )
        self.clips, self.objective, self.seed = clips, objective, seed
        self.batch_size, self.micro_batch = batch_size, micro_batch
        self.rank, self.processes = rank, processes
        self.accumulation_steps = batch_size // (micro_batch * processes)
        self.bucket_numbers = list(clips.buckets.values())
        self.shares = np.cumsum([len(bucket) for bucket in self.bucket_numbers]) / len(clips)
        self.chosen = np.empty(0, dtype=np.int64)

    def numbers(self, step: int) -> list[int]:
        """The clips of the whole batch of a step."""
        self._choose_buckets(step + 1)
        which = self.chosen[step]
        bucket = self.bucket_numbers[which]
        first = int((self.chosen[:step] == which).sum()) * self.batch_size
        places = (divmod(n, len(bucket)) for n in range(first, first + self.batch_size))
        return [bucket[_order(self.seed, which, epoch, len(bucket))[place]] for epoch, place in places]

    def draw(self, step: int, place: int) -> Draw:
        """What is random about the clip at a place of a step's batch; its generator gives the noise next."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, DRAW, step, place))
        quantile, chance = torch.rand(2, generator=generator, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
        sigma = sigmas_from_quantiles(quantile, self.objective)
        return Draw(sigma, chance.item() < self.objective.text_dropout, generator)

    def __getitem__(self, number: int) -> LatentBatch:
        step, part = divmod(number, self.accumulation_steps)
        first = (part * self.processes + self.rank) * self.micro_batch
        numbers = self.numbers(step)
        rows = []
        for place in range(first, first + self.micro_batch):
            latents, text = self.clips.load(numbers[place])
            sigma, drops_caption, generator = self.draw(step, place)
            noise = torch.randn(latents.shape, generator=generator)
            rows.append((latents, noise, sigma, self.clips.padded(self.clips.null_caption) if drops_caption else text))
        return LatentBatch(*(torch.stack(column) for column in zip(*rows)))

    def load(self, first_step: int, last_step: int, workers: int) -> Iterator[LatentBatch]:
        """The micro-batches of steps `first_step` to before `last_step`, in order."""
        numbers = range(first_step * self.accumulation_steps, last_step * self.accumulation_steps)
        return load_items(self, numbers, workers)

    def _choose_buckets(self, steps: int) -> None:
        if len(self.chosen) < steps:
            # Generously, so that this is done rarely; a longer series begins with the shorter one.
            drawn = np.random.default_rng((self.seed, BUCKET)).random(2 * steps)
            self.chosen = np.searchsorted(self.shares, drawn, side="right").clip(max=len(self.shares) - 1)


def validation_batch(clips: Clips, objective: ObjectiveSettings, number: int, count: int) -> LatentBatch:
    """The batch of one clip, `number` of `count`, for validation: always with the same noise at the same level.

    The levels of all are spread evenly over the distribution that training draws from.
    """
    latents, text = clips.load(number)
    generator = torch.Generator().manual_seed(seed_of(VALIDATION, number))
    noise = torch.randn(latents.shape, generator=generator)
    quantile = torch.tensor((number + 0.5) / count, dtype=torch.float64)
    return LatentBatch(latents[None], noise[None], sigmas_from_quantiles(quantile, objective)[None], text[None])


def seed_of(*numbers: int) -> int:
    """A seed for torch of whole numbers, unlike that of any others."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@functools.lru_cache(16)
def _order(seed: int, bucket: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, ORDER, int(bucket), epoch)).permutation(count)
