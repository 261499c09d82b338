"""A checkpoint, as a directory or a hub id, of any family and in any layout: what it is and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nabla import InputError, NablaConfig
from nabla.config import is_count
from wan.checkpoints.file_errors import CheckpointError, exists, read_json_object
from wan.checkpoints.locate import CONFIG, INDEX, check_no_lora, download, explain, find_folder
from wan.checkpoints.single_file import open_transformer
from wan.config.config_files import read_settings
from wan.config.settings import SamplingSettings, Settings, attention_config, resolve, resolve_sampling
from wan.models.family import Family, Layout, TransformerFacts
from wan.models.registry import FAMILIES

DEFAULTS_FILE = "defaults.yaml"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Checkpoint:
    """Where the components of a checkpoint lie. Build with `Checkpoint.open`; its family's pipeline loads them.

    name: what it was opened by, a directory made absolute
    published: in its family's own layout, else in diffusers'
    config: of the transformer, as its JSON says
    """

    name: str
    folder: Path
    published: bool
    config: dict[str, Any]
    family: Family

    @classmethod
    def open(cls, name: str | Path, with_transformer: bool = True) -> Checkpoint:
        """Find a checkpoint by directory or hub id (which is downloaded unless cached) and read its configuration.

        with_transformer: the transformer's weights are needed, and worth their download
        Raises `CheckpointError` if it cannot be had, or is not of a family of `FAMILIES`.
        """
        folder = find_folder(name)
        if folder is not None:
            return cls._read(str(folder), folder)
        # The configuration first: a model of another kind should not cost its whole download.
        configurations = [pattern for family in FAMILIES for pattern in family.hub_files.configurations]
        files = cls._read(str(name), download(str(name), configurations)).family.hub_files
        left_out = None if with_transformer else files.transformer
        return cls._read(str(name), download(str(name), files.configurations + files.others, left_out))

    @classmethod
    def _read(cls, name: str, folder: Path) -> Checkpoint:
        family, (published, config) = recognise(folder)
        return cls(name, folder, published, config, family)

    @property
    def text_length(self) -> int:
        """Rows of text states that the transformer sees."""
        return self._facts.text_length

    @property
    def heads(self) -> int:
        """Attention heads of the transformer."""
        heads = self._facts.heads
        if not is_count(heads) or heads == 0:
            raise CheckpointError(f"{self.folder}: its configuration gives {heads!r} heads, not a positive integer")
        return heads

    @property
    def positions(self) -> int:
        """Of the transformer's rotary table, along each axis."""
        return self._facts.positions

    @property
    def _facts(self) -> TransformerFacts:
        return self.family.facts(Layout(self.published, self.config))

    @property
    def tokenizer_folders(self) -> tuple[Path, ...]:
        """One for each of the family's text encoders."""
        names = self.family.tokenizers
        return tuple(self.folder / (names[name] if self.published else name) for name in names)

    @property
    def tokenizer_folder(self) -> Path:
        """That of the first text encoder, for a family that has one."""
        return self.tokenizer_folders[0]

    def require_tokenizer(self) -> None:
        """Raise `CheckpointError` if there is no tokenizer, without which a prompt cannot be encoded."""
        for folder in self.tokenizer_folders:
            if not exists(folder / TOKENIZER_FILE):
                raise CheckpointError(
                    f"{folder / TOKENIZER_FILE} is missing, so prompts cannot be read; download the checkpoint again"
                )

    @property
    def settings_layers(self) -> tuple[dict[str, Any], ...]:
        """The settings that a checkpoint brings, highest in rank first: its defaults file, and its own algorithm.

        Raises `InputError` if the file is not a mapping of settings, or names a checkpoint, a prompt or a picture.
        """
        path = self.folder / DEFAULTS_FILE
        defaults = read_settings(path) if exists(path) else {}
        if unfit := [name for name in ("checkpoint", "prompt", "image") if name in defaults]:
            raise CheckpointError(f"{path} may not name {'an' if unfit[0] == 'image' else 'a'} {unfit[0]}; remove it")
        return defaults, self.own_algorithm

    def resolve(self, *above: Mapping[str, Any], needs_prompt: bool = True) -> Settings:
        """The settings of layers that rank above the checkpoint's own, of those, and of its family's.

        needs_prompt: as of `wan.config.settings.resolve`
        """
        try:
            return resolve(
                {"checkpoint": self.name},
                *above,
                *self.settings_layers,
                self.family.defaults,
                geometry=self.family.geometry,
                needs_prompt=needs_prompt,
            )
        except InputError:
            # An algorithm that is not understood is no fault of the layers above; say where it stands.
            self.own_attention()
            raise

    @property
    def own_algorithm(self) -> dict[str, Any]:
        """The attention that the weights were fine-tuned for, as a layer of settings; empty if they do not say."""
        named = self.config.get("sparse_algo")
        return {} if named is None else {"attention": {"algorithm": named}}

    def own_attention(self) -> NablaConfig | None:
        """`own_algorithm` as a config; raises `CheckpointError` if it is not understood."""
        if not self.own_algorithm:
            return None
        try:
            return attention_config(self.own_algorithm["attention"])
        except InputError as error:
            raise CheckpointError(f"{self.folder}, sparse_algo of its configuration: {error}") from None

    def own_sampling(self) -> SamplingSettings:
        """How the checkpoint is sampled where nothing says else."""
        return resolve_sampling(*self.settings_layers, self.family.defaults)


def recognise(folder: Path) -> tuple[Family, Layout]:
    """The family of the checkpoint in a folder, and its layout; raises `CheckpointError` if there is none of any."""
    has_index = exists(folder / INDEX)
    if not has_index:
        check_no_lora(folder)
    for family in FAMILIES:
        if (layout := family.recognise(folder)) is not None:
            return family, layout
    if not has_index and not exists(folder / CONFIG):
        raise explain(folder, [family.landmarks for family in FAMILIES])
    kind = read_json_object(folder / (INDEX if has_index else CONFIG)).get("_class_name")
    known = " and ".join(family.name for family in FAMILIES)
    raise CheckpointError(f"{folder} is a {kind}; only {known} checkpoints are supported")


def check_transformer_file(file: str | Path) -> None:
    """Raise as `open_transformer` does unless a single file is a transformer of one of the families."""
    for family in FAMILIES:
        try:
            open_transformer(file, family.naming)
            return
        except CheckpointError as error:
            # Python forgets `error` behind this clause. If no family takes the file, the last one says why.
            refused = error
    raise refused
