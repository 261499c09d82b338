"""What runs: a checkpoint, what stands in for its weights or is added to them, and how it computes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nabla import InputError, NablaConfig
from nabla.checks import is_number
from wan.config.cache_settings import CacheSettings
from wan.config.checks import absolute_path, check_keys, check_path, check_text
from wan.files.formats import SAFETENSORS

DTYPES = ("bfloat16", "float16", "float32")
MAX_LORA_SCALE = 100
# Of a checkpoint of two transformers, by the noise of the steps in which they run, in the order in which they do.
EXPERTS = ("high", "low")
# What may come from elsewhere than the checkpoint.
COMPONENTS = ("vae", "text_encoder", "text_encoder_2")
# As diffusers names it.
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA and the scale of what it adds to the weights. The path is made absolute.

    file: or a folder that has one of training's: a checkpoint of a run, or the folder `lora` in it
    expert: the one of `EXPERTS` whose weights it is for; None for those of all transformers that there are
    """

    file: str
    scale: float = 1.0
    expert: str | None = None

    def __post_init__(self) -> None:
        given = Path(absolute_path("lora file", self.file))
        # os.path says no where pathlib may raise, as of a folder that may not be looked into.
        inside = (path for path in (given / LORA_FILE, given / "lora" / LORA_FILE) if os.path.isfile(path))
        object.__setattr__(self, "file", str(next(inside, given)))
        if not is_number(self.scale) or abs(self.scale) > MAX_LORA_SCALE:
            limits = f"from -{MAX_LORA_SCALE} to {MAX_LORA_SCALE}"
            raise InputError(f"lora scale {self.scale!r} is not a number {limits}; 1.0 is usual")
        if self.expert not in (None, *EXPERTS):
            raise InputError(f"lora expert {self.expert!r} is not known; use {' or '.join(EXPERTS)}, or leave it out")

    @classmethod
    def parse(cls, given: object) -> LoraFile:
        """From `file`, `file:scale`, `high:file:scale` of one of two experts, or a mapping of these."""
        if isinstance(given, cls):
            return given
        if isinstance(given, Mapping):
            check_keys("lora", given, {"file", "scale", "expert"})
            # A mapping without a file gets the line about paths, not a TypeError.
            return cls(**{"file": None, **given})
        if not isinstance(given, str):
            raise InputError(f"lora {given!r} is neither a file, nor file:scale, nor a mapping of file and scale")
        expert, path = split_expert(given)
        # Paths may hold colons: the last one counts, and only before a number; else it is the path's own.
        file, _, scale = path.rpartition(":")
        try:
            number = float(scale)
        except ValueError:
            # After the ending of a file only a scale can be meant.
            if file.endswith(SAFETENSORS) and not scale.endswith(SAFETENSORS):
                raise InputError(f"lora {given!r}: scale {scale!r} is not a number; write {file}:0.8") from None
            return cls(path, expert=expert)
        return cls(file, number, expert)


@dataclass(frozen=True)
class ExpertFiles:
    """Files of weights in place of those of a checkpoint's experts; None for one that has its own. Made absolute."""

    high: str | None = None
    low: str | None = None

    def __post_init__(self) -> None:
        if self.high is None and self.low is None:
            raise InputError(f"transformer names no file; give one of {' or '.join(EXPERTS)}, or leave it out")
        for expert in EXPERTS:
            if (file := getattr(self, expert)) is not None:
                object.__setattr__(self, expert, absolute_path(f"transformer of {expert} noise", file))


def expert_text(expert: str | None) -> str:
    """What stands before the file of an expert, where it is one's."""
    return "" if expert is None else f"{expert}:"


def split_expert(given: str) -> tuple[str | None, str]:
    """The expert that `high:FILE` or `low:FILE` names, and the file; None for any other text, which is a file."""
    expert, colon, file = given.partition(":")
    return (expert, file) if colon and expert in EXPERTS else (None, given)


def parse_transformer(given: object) -> str | ExpertFiles | None:
    """The file of a transformer made absolute, or those of experts: from a mapping, or `high:FILE,low:FILE`.

    Raises `InputError` for what is none of these.
    """
    if given is None or isinstance(given, ExpertFiles):
        return given
    if isinstance(given, Mapping):
        check_keys("transformer", given, EXPERTS)
        return ExpertFiles(**given)
    if isinstance(given, str) and split_expert(given)[0] is not None:
        files = {}
        # A comma is a path's own unless an expert comes behind it.
        for part in re.split(rf",(?=(?:{'|'.join(EXPERTS)}):)", given):
            expert, file = split_expert(part)
            assert expert is not None
            if expert in files:
                raise InputError(f"transformer {given!r} names the {expert} expert twice; give one file each")
            files[expert] = file
        return ExpertFiles(**files)
    return absolute_path("transformer", given)


def files_of(transformer: object) -> dict[str | None, str]:
    """What `parse_transformer` takes, as files by their expert; None is that of the only transformer."""
    parsed = parse_transformer(str(transformer) if isinstance(transformer, Path) else transformer)
    if not isinstance(parsed, ExpertFiles):
        return {} if parsed is None else {None: parsed}
    files = {expert: getattr(parsed, expert) for expert in EXPERTS}
    return {expert: file for expert, file in files.items() if file is not None}


@dataclass(frozen=True)
class ModelSettings:
    """What runs.

    checkpoint: directory or hub id; transformer, lora: files; dtype None: the device's
    transformer: one file, or those of experts; it may be given in any form that `parse_transformer` takes
    kind: of checkpoint that the settings are for, as its family calls it; None for any
    vae, text_encoder, text_encoder_2: directories or hub ids of what its layout leaves to others, or of what stands in
        for its own; named as diffusers' pipelines name them
    """

    checkpoint: str
    kind: str | None = None
    transformer: str | ExpertFiles | None = None
    vae: str | None = None
    text_encoder: str | None = None
    text_encoder_2: str | None = None
    lora: tuple[LoraFile, ...] = ()
    dtype: str | None = None
    vae_dtype: str | None = None
    fp8: bool = False
    cache: CacheSettings | None = None
    attention: NablaConfig = NablaConfig()

    def __post_init__(self) -> None:
        if not isinstance(self.checkpoint, str) or not self.checkpoint:
            raise InputError(f"checkpoint {self.checkpoint!r} is not a directory or a hub id")
        check_path("checkpoint", self.checkpoint)
        object.__setattr__(self, "transformer", parse_transformer(self.transformer))
        if self.kind is not None:
            check_text("kind", self.kind)
        for name, given in self.components.items():
            object.__setattr__(self, name, _directory_or_id(name, given))
        if not isinstance(self.lora, (list, tuple)):
            raise InputError(f"lora {self.lora!r} is not a list; write one file or more in brackets")
        object.__setattr__(self, "lora", tuple(map(LoraFile.parse, self.lora)))
        for name in ("dtype", "vae_dtype"):
            if getattr(self, name) not in (None, *DTYPES):
                raise InputError(f"{name} {getattr(self, name)!r} is not known; use one of {', '.join(DTYPES)}")
        if not isinstance(self.fp8, bool):
            raise InputError(f"fp8 {self.fp8!r} is neither true nor false")
        object.__setattr__(self, "cache", CacheSettings.parse(self.cache))

    @property
    def transformer_files(self) -> dict[str | None, str]:
        """The files that stand in for a transformer's weights, by its expert; None is that of the only transformer."""
        return files_of(self.transformer)

    def lora_of(self, expert: str | None) -> list[LoraFile]:
        """The LoRA files for the weights of an expert, or of the only transformer."""
        return [one for one in self.lora if one.expert in (None, expert)]

    def check_experts(self, count: int) -> None:
        """Raise `InputError` for files of experts where there is one transformer, and for one where there are two."""
        files = self.transformer_files
        if count == 1 and (named := [one for one in files if one] + [one.expert for one in self.lora if one.expert]):
            what = "transformer" if any(files) else "lora"
            raise InputError(
                f"{what} {named[0]}:... is for a checkpoint of two experts, and this one has one transformer; "
                f"leave {named[0]}: out"
            )
        if count > 1 and None in files:
            raise InputError(
                f"transformer {files[None]} could stand in for either expert of this checkpoint, high or low noise; "
                f"write {' or '.join(f'{expert}:FILE' for expert in EXPERTS)}"
            )

    @property
    def components(self) -> dict[str, str]:
        """Where components lie that are not the checkpoint's own, by their names."""
        given = {name: getattr(self, name) for name in COMPONENTS}
        return {name: where for name, where in given.items() if where is not None}


def _directory_or_id(name: str, given: object) -> str:
    """A directory made absolute, or anything else, such as a hub id, as it is."""
    path = absolute_path(name, given)
    return path if os.path.isdir(path) else str(given)
