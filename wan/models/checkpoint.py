"""A checkpoint, as a directory or a hub id, of any family and in any layout: what it is and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nabla import InputError, NablaConfig
from nabla.checks import is_count
from wan.checkpoints.component_files import ComponentFiles
from wan.checkpoints.file_errors import CheckpointError, exists, read_json_object
from wan.checkpoints.locate import CONFIG, download, find_folder
from wan.checkpoints.weights import WeightFiles
from wan.config.attention_settings import attention_config, untuned_layer
from wan.config.config_files import read_settings
from wan.config.geometry import Geometry
from wan.config.inputs import INPUTS
from wan.config.model_settings import ExpertFiles, files_of
from wan.config.settings import SamplingSettings, Settings, resolve, resolve_sampling, size_in
from wan.models.companions import companion_folder, given_folder
from wan.models.family import Family, Layout, TransformerFacts
from wan.models.recognise import family_on_hub, recognise, recognise_with

DEFAULTS_FILE = "defaults.yaml"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Checkpoint:
    """Where the components of a checkpoint lie. Build with `Checkpoint.open`; its family's pipeline loads them.

    name: what it was opened by, a directory made absolute
    published: in its family's own layout, else in diffusers'
    config: of the transformer, as its JSON says, or its tensors; of the first of two
    components: directories or hub ids of those that are taken from elsewhere, by their names
    kind, boundary: as of `Layout`
    """

    name: str
    folder: Path
    published: bool
    config: dict[str, Any]
    family: Family
    components: Mapping[str, str] = field(default_factory=dict)
    kind: str = ""
    boundary: float | None = None

    @classmethod
    def open(
        cls,
        name: str | Path,
        transformer: str | Path | Mapping[str, str] | ExpertFiles | None = None,
        components: Mapping[str, str] | None = None,
    ) -> Checkpoint:
        """Find a checkpoint by directory or hub id (which is downloaded unless cached) and read its configuration.

        transformer: a file of weights in place of the checkpoint's, which are not worth their download then; or
            those of experts, by their names or as `high:FILE`
        components: of those taken from elsewhere, directories or hub ids by name
        Raises `CheckpointError` if it cannot be had, or is not of a family of `FAMILIES`.
        """
        folder, name = find_folder(name), str(name)
        given = files_of(transformer)
        if folder is None:
            files = family_on_hub(name).hub_files
            folder = download(name, files.configurations + files.others, files.left_out(given))
        else:
            name = str(folder)
        family, layout = recognise_with(folder, Path(given[None])) if None in given else recognise(folder)
        if components and (unfit := components.keys() - {one.name for one in family.companions}):
            raise InputError(f"{min(unfit)} from elsewhere is not taken for {family.name}; leave it out")
        return cls(
            name, folder, layout.published, layout.config, family, components or {}, layout.kind, layout.boundary
        )

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
        return self.family.facts(self.layout)

    @property
    def layout(self) -> Layout:
        """What its family reads off it."""
        return Layout(self.published, self.config, self.kind, self.boundary)

    @property
    def geometry(self) -> Geometry:
        """How it cuts pixels into latents and tokens."""
        return self.family.geometry_of(self.layout)

    @property
    def component_files(self) -> tuple[ComponentFiles, ...]:
        """Of its models, the transformers first."""
        return self.family.components_of(self.layout)

    def folder_of(self, component: str) -> Path:
        """The folder of a component that has one in either layout: the checkpoint's own, or where else it lies.

        What a published layout leaves to another repository is downloaded from there unless it is here. Raises
        `CheckpointError` if it cannot be had.
        """
        companion = next((one for one in self.family.companions if one.name == component), None)
        if companion is not None and component in self.components:
            return given_folder(companion, self.components[component], self.family.name)
        if companion is None or not self.published:
            return self.folder / component
        own = self.folder / companion.folder
        return own if exists(own) else companion_folder(companion, self.folder)

    def transformer_config(self, component: str) -> dict[str, Any]:
        """The configuration of a transformer: `config`, or that of the second of two.

        Raises `CheckpointError` if it cannot be read, or the two are not of one size.
        """
        first = self.component_files[0]
        if component == first.name:
            return self.config
        files = next(one for one in self.component_files if one.name == component)
        file = (self.folder / files.published).parent / CONFIG if self.published else self.folder / component / CONFIG
        config = read_json_object(file)
        for key in self.config.keys() | config.keys():
            if not key.startswith("_") and self.config.get(key) != config.get(key):
                raise CheckpointError(
                    f"{file}: {key} is {config.get(key)!r}, and {self.config.get(key)!r} for the first transformer; "
                    "the two must be of one size"
                )
        return config

    def weights_of(self, component: str) -> WeightFiles:
        """The tensors of a component; raises `CheckpointError` if they are not all there."""
        files = next(one for one in self.component_files if one.name == component)
        if any(one.name == component for one in self.family.companions):
            return WeightFiles.find(self.folder_of(component), files.stem)
        return files.find(self.folder, self.published)

    @property
    def tokenizer_folders(self) -> tuple[Path, ...]:
        """One for each of the family's text encoders."""
        return tuple(self._tokenizer_folder(name) for name in self.family.tokenizers)

    def _tokenizer_folder(self, name: str) -> Path:
        published = self.family.tokenizers[name]
        companion = next((one.name for one in self.family.companions if one.folder == published), None)
        if companion is None:
            return self.folder / (published if self.published else name)
        if companion not in self.components:
            return self.folder_of(companion) if self.published else self.folder / name
        # One that is given may have it in itself or, as in diffusers' layout, beside it; or be a model alone.
        folder = self.folder_of(companion)
        places = [folder, folder.parent / name, *([] if self.published else [self.folder / name])]
        return next((one for one in places if self._tokenizer_files(one, name)), folder)

    def tokenizer_files(self, name: str) -> tuple[Path, ...]:
        """The files that say all of a tokenizer, by its folder in diffusers' layout; none if they are not there."""
        return self._tokenizer_files(self._tokenizer_folder(name), name)

    def _tokenizer_files(self, folder: Path, name: str) -> tuple[Path, ...]:
        for parts in ((TOKENIZER_FILE,), self.family.tokenizer_parts.get(name, ())):
            if parts and all(exists(folder / part) for part in parts):
                return tuple(folder / part for part in parts)
        return ()

    @property
    def tokenizer_folder(self) -> Path:
        """That of the first text encoder, for a family that has one."""
        return self.tokenizer_folders[0]

    def require_companions(self) -> None:
        """Find what comes from other repositories; raises `CheckpointError` for what is not here and cannot be had."""
        for companion in self.family.companions:
            self.folder_of(companion.name)

    def require_tokenizer(self) -> None:
        """Raise `CheckpointError` if there is no tokenizer, without which a prompt cannot be encoded."""
        for name, folder in zip(self.family.tokenizers, self.tokenizer_folders):
            if not self.tokenizer_files(name):
                raise CheckpointError(
                    f"{folder / TOKENIZER_FILE} is missing, so prompts cannot be read; download the checkpoint again"
                )

    def check_kind(self, kind: str | None) -> None:
        """Raise `CheckpointError` if settings are for another kind of checkpoint than this can be."""
        possible = self.family.kinds_of(self.layout)
        if kind is not None and kind not in possible:
            what = " or ".join(sorted(possible)) or self.family.name
            raise CheckpointError(
                f"the settings are for {kind} and checkpoint {self.name} is {what}; "
                "name another with --ckpt_dir, or a --config for it"
            )

    def begins_with_picture(self, kind: str | None) -> bool | None:
        """Whether videos begin with a picture, of a kind that settings name; None if they may."""
        inputs = self.family.inputs_of(self.layout, kind)
        return None if "image" in inputs.optional else "image" in inputs.required

    @property
    def settings_layers(self) -> tuple[dict[str, Any], ...]:
        """The settings that a checkpoint brings, highest in rank first: its defaults file, and its own algorithm.

        Raises `InputError` if the file is not a mapping of settings, or names a checkpoint, a prompt or what else a
        single video is made of.
        """
        path = self.folder / DEFAULTS_FILE
        defaults = read_settings(path) if exists(path) else {}
        if unfit := [name for name in ("checkpoint", "prompt", *INPUTS) if name in defaults]:
            raise CheckpointError(f"{path} may not name {'an' if unfit[0] == 'image' else 'a'} {unfit[0]}; remove it")
        return defaults, self.own_algorithm

    def resolve(self, *above: Mapping[str, Any], needs_prompt: bool = True) -> Settings:
        """The settings of layers that rank above the checkpoint's own, of those, and of its family's.

        needs_prompt: as of `wan.config.settings.resolve`
        """
        try:
            own = self.settings_layers
            unsaid = untuned_layer(above, own, self.own_algorithm.get("attention", {}).get("algorithm"))
            layers = unsaid, *above, *own
            settings = resolve(
                {"checkpoint": self.name},
                *layers,
                self.family.defaults(self.layout, size_in(layers)),
                geometry=self.geometry,
                needs_prompt=needs_prompt,
            )
        except InputError:
            # An algorithm that is not understood is no fault of the layers above; say where it stands.
            self.own_attention()
            raise
        self.check_kind(settings.model.kind)
        profile, own_layers = settings.attention.profile, self._facts.layers
        if profile is not None and is_count(own_layers):
            profile.check_layers(own_layers)
        count = 1 if self.boundary is None else 2
        settings.model.check_experts(count)
        settings.sampling.check_experts(count)
        return settings

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
        layers = self.settings_layers
        return resolve_sampling(*layers, self.family.defaults(self.layout, size_in(layers)))
