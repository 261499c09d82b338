"""The settings that requests start from: the files of `configs/`, and those that the operator names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nabla import InputError
from wan.checkpoints.file_errors import CheckpointError
from wan.checkpoints.locate import check_hub_id
from wan.config.config_files import CONFIG_FOLDER, read_settings
from wan.config.settings import Settings, resolve
from wan.models.checkpoint import Checkpoint

OWN = "The checkpoint's own"

Layer = dict[str, Any]


@dataclass(frozen=True)
class Presets:
    """The settings to start from.

    flags: from the command line, which rank above every preset
    default_checkpoint: if neither flags nor a preset name one
    config: of the command line: a file, or a name in `configs/`, which is the first preset
    """

    flags: Mapping[str, Any]
    default_checkpoint: str
    config: str | None = None
    files: Mapping[str, Path] = field(init=False)

    def __post_init__(self) -> None:
        files = {path.stem: path for path in sorted(CONFIG_FOLDER.glob("*.yaml"))}
        given = self.flags.get("checkpoint")
        if given is not None and Path(given).expanduser().is_dir():
            # It stands for that of every preset, of which some are for another kind. One that is asked for by name is
            # kept, to be refused in words.
            checkpoint = Checkpoint.open(given)
            files = {name: path for name, path in files.items() if _is_for(path, checkpoint)}
        if self.config is not None:
            # For its errors alone: a wrong file is said at the start.
            read_settings(self.config)
            files = {Path(self.config).stem: Path(self.config)} | files
        object.__setattr__(self, "files", files)

    @property
    def names(self) -> list[str]:
        return [OWN, *self.files]

    @property
    def first(self) -> str:
        return OWN if self.config is None else Path(self.config).stem

    def settings(self, name: str) -> Settings:
        """The settings of a preset, without a prompt of its own.

        A checkpoint's own ones are among them if it is a directory; from a hub it is fetched when a video wants it.
        Raises `InputError` for settings that are not allowed, and a checkpoint that can be neither.
        """
        layers = self.flags, self._layer(name), self._lowest
        settings = resolve(*layers, needs_prompt=False)
        if Path(settings.checkpoint).expanduser().is_dir():
            return Checkpoint.open(settings.checkpoint).resolve(*layers, needs_prompt=False)
        check_hub_id(settings.checkpoint)
        return settings

    def describe(self, name: str) -> str:
        """The comment that a preset's file begins with."""
        if name not in self.files:
            return ""
        path = self.files[name]
        path = path if path.is_file() else CONFIG_FOLDER / path
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = [line[1:].strip() for line in lines if line.startswith("#")] if path.suffix == ".yaml" else []
        return " ".join(comment)

    def checkpoints(self) -> set[str]:
        """The checkpoints that the page may run."""
        every = (resolve(self.flags, self._layer(n), self._lowest, needs_prompt=False) for n in self.names)
        return {settings.checkpoint for settings in every}

    @property
    def _lowest(self) -> Layer:
        return {"checkpoint": self.default_checkpoint}

    def _layer(self, name: str) -> Layer:
        if name == OWN:
            return {}
        if name not in self.files:
            raise InputError(f"preset {name!r} is not known; use one of {', '.join(self.names)}")
        # Its file may have a prompt, as a sidecar does; the page's is a control that presets leave alone.
        return {key: value for key, value in read_settings(self.files[name]).items() if key != "prompt"}


def _is_for(config: Path, checkpoint: Checkpoint) -> bool:
    """Whether a config is not for another kind of checkpoint."""
    try:
        checkpoint.check_kind(read_settings(config).get("kind"))
    except CheckpointError:
        return False
    return True
