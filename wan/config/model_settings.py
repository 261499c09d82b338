"""What runs: a checkpoint, what stands in for its weights or is added to them, and how it computes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nabla import InputError, NablaConfig
from nabla.config import is_number
from wan.config.cache_settings import CacheSettings
from wan.config.checks import absolute_path, check_keys, check_path, check_text
from wan.files.formats import SAFETENSORS

DTYPES = ("bfloat16", "float16", "float32")
MAX_LORA_SCALE = 100
# What may come from elsewhere than the checkpoint.
COMPONENTS = ("vae", "text_encoder", "text_encoder_2")
# As diffusers names it.
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA and the scale of what it adds to the weights. The path is made absolute.

    file: or a folder that has one of training's: a checkpoint of a run, or the folder `lora` in it
    """

    file: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        given = Path(absolute_path("lora file", self.file))
        # os.path says no where pathlib may raise, as of a folder that may not be looked into.
        inside = (path for path in (given / LORA_FILE, given / "lora" / LORA_FILE) if os.path.isfile(path))
        object.__setattr__(self, "file", str(next(inside, given)))
        if not is_number(self.scale) or abs(self.scale) > MAX_LORA_SCALE:
            limits = f"from -{MAX_LORA_SCALE} to {MAX_LORA_SCALE}"
            raise InputError(f"lora scale {self.scale!r} is not a number {limits}; 1.0 is usual")

    @classmethod
    def parse(cls, given: object) -> LoraFile:
        """From `file`, `file:scale`, or a mapping of both."""
        if isinstance(given, cls):
            return given
        if isinstance(given, Mapping):
            check_keys("lora", given, {"file", "scale"})
            # A mapping without a file gets the line about paths, not a TypeError.
            return cls(**{"file": None, **given})
        if not isinstance(given, str):
            raise InputError(f"lora {given!r} is neither a file, nor file:scale, nor a mapping of file and scale")
        # Paths may hold colons: the last one counts, and only before a number; else it is the path's own.
        file, _, scale = given.rpartition(":")
        try:
            number = float(scale)
        except ValueError:
            # After the ending of a file only a scale can be meant.
            if file.endswith(SAFETENSORS) and not scale.endswith(SAFETENSORS):
                raise InputError(f"lora {given!r}: scale {scale!r} is not a number; write {file}:0.8") from None
            return cls(given)
        return cls(file, number)


@dataclass(frozen=True)
class ModelSettings:
    """What runs.

    checkpoint: directory or hub id; transformer, lora: files; dtype None: the device's
    kind: of checkpoint that the settings are for, as its family calls it; None for any
    vae, text_encoder, text_encoder_2: directories or hub ids of what its layout leaves to others, or of what stands in
        for its own; named as diffusers' pipelines name them
    """

    checkpoint: str
    kind: str | None = None
    transformer: str | None = None
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
        if self.transformer is not None:
            object.__setattr__(self, "transformer", absolute_path("transformer", self.transformer))
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
    def components(self) -> dict[str, str]:
        """Where components lie that are not the checkpoint's own, by their names."""
        given = {name: getattr(self, name) for name in COMPONENTS}
        return {name: where for name, where in given.items() if where is not None}


def _directory_or_id(name: str, given: object) -> str:
    """A directory made absolute, or anything else, such as a hub id, as it is."""
    path = absolute_path(name, given)
    return path if os.path.isdir(path) else str(given)
