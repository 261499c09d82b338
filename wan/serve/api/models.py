"""The models that a server offers: configs by their names, each with its checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nabla import InputError
from wan.config.config_files import read_settings
from wan.config.inputs import INPUTS
from wan.config.settings import Settings, resolve
from wan.models.checkpoint import Checkpoint
from wan.models.family import MediaInputs
from wan.run.settle import check_small
from wan.serve.api.bodies import PICTURES
from wan.serve.api.errors import ApiError

Layer = Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """A checkpoint and the settings that requests start from.

    flags: of the operator, which rank above requests; config: which rank below
    """

    name: str
    checkpoint: Checkpoint
    flags: Layer
    config: Layer

    @classmethod
    def open(cls, config: str | None, flags: Layer, default_checkpoint: str) -> Model:
        """The model of a config, by path or by name in `configs/`; of None that of the checkpoint that flags name.

        A checkpoint that is not here is downloaded. Raises `InputError` for what cannot be served.
        """
        layer = {} if config is None else read_settings(config)
        # Those of a video's sidecar are of that video.
        layer = {key: value for key, value in layer.items() if key not in ("prompt", "expanded_prompt", *INPUTS)}
        settings = resolve(flags, layer, {"checkpoint": default_checkpoint}, needs_prompt=False)
        if settings.checkpoint == default_checkpoint:
            check_small(Path(default_checkpoint))
        checkpoint = Checkpoint.open(settings.checkpoint, settings.transformer, settings.model.components)
        name = Path(settings.checkpoint).name if config is None else Path(config).stem
        model = cls(name, checkpoint, flags, layer)
        if unmet := model.inputs.required - set(PICTURES.values()):
            raise InputError(f"model {name} needs {', '.join(sorted(unmet))}, which the server does not take")
        # For its errors, and those of its kind, before anyone asks.
        model.resolve({}, needs_prompt=False)
        return model

    @property
    def inputs(self) -> MediaInputs:
        """The files that its videos are made of beside a prompt."""
        kind = self.flags.get("kind") or self.config.get("kind")
        return self.checkpoint.family.inputs_of(self.checkpoint.layout, kind)

    def resolve(self, layer: Layer, needs_prompt: bool = True) -> Settings:
        """The settings of a request; raises `InputError` for what is not allowed."""
        settings = self.checkpoint.resolve(self.flags, layer, self.config, needs_prompt=needs_prompt)
        settings.video.check_positions(self.checkpoint.positions)
        return settings


class Models:
    """Models by name, of which the first is taken where a request names none."""

    def __init__(self, models: Iterable[Model]):
        self.by_name: dict[str, Model] = {}
        for model in models:
            if model.name in self.by_name:
                raise InputError(f"two configs are named {model.name}; rename one, for clients ask by it")
            self.by_name[model.name] = model

    def __getitem__(self, name: str | None) -> Model:
        """Raises `ApiError`, 404, for one that is not there."""
        if name is None:
            return next(iter(self.by_name.values()))
        if name not in self.by_name:
            known = ", ".join(self.by_name)
            raise ApiError(404, f"model {name[:100]!r} is not here; use {known}", "model_not_found", "model")
        return self.by_name[name]
