"""The seam between the machinery and a model family: what one has to know of the other, in one frozen dataclass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from nabla import InputError
from wan.attention.spec import TransformerSpec
from wan.checkpoints.component_files import ComponentFiles
from wan.checkpoints.naming import TransformerNaming
from wan.config.geometry import DEFAULT_GEOMETRY, Geometry

# What a family may have no use for, or not support yet, by the names of the settings that ask for it.
FEATURES = frozenset({"cache", "dit_fsdp", "expand_prompt", "fp8", "gguf", "lora", "memory", "t5_fsdp", "ulysses_size"})


class Layout(NamedTuple):
    """What a family reads off a folder that holds one of its checkpoints.

    published: in the layout in which the family's weights were published, else in diffusers'
    config: of the transformer, as its JSON says, or as its tensors do where there is none; of the first of two
    kind: of the family's kinds of checkpoints; empty where that is not told
    boundary: share of the timesteps from which on the first of two transformers runs; None where there is one
    """

    published: bool
    config: dict[str, Any]
    kind: str = ""
    boundary: float | None = None


class MediaInputs(NamedTuple):
    """What is given beside the prompt, by the names that it has in settings."""

    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()

    @property
    def taken(self) -> frozenset[str]:
        """All that may be given."""
        return self.required | self.optional


class TransformerFacts(NamedTuple):
    """What is asked of a transformer before any of its files is opened, off its configuration alone.

    heads: of its attention, as the configuration has it, right or wrong
    positions: of its rotary table, along each axis
    text_length: rows of text states that it sees
    layers: of self-attention, through all lists of its blocks; as of `heads`, and None where it is not said
    """

    heads: object
    positions: int
    text_length: int
    layers: object = None


@dataclass(frozen=True)
class HubFiles:
    """Patterns of the files of a checkpoint on the hub, in any layout.

    configurations: all that `Family.recognise` reads: what is of another family should not cost its whole download
    others: all else that a run may need
    transformer: of those, the transformer's weights, which a run that has them elsewhere leaves out
    experts: the same of each of two transformers, by its name in settings
    """

    configurations: tuple[str, ...]
    others: tuple[str, ...]
    transformer: tuple[str, ...]
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def left_out(self, given: Collection[str | None]) -> tuple[str, ...] | None:
        """What need not be had where files stand in for the transformers of these names; None: of the only one."""
        patterns = [self.transformer if name is None else self.experts.get(name, ()) for name in given]
        return tuple(pattern for each in patterns for pattern in each) or None


@dataclass(frozen=True)
class Companion:
    """A component that a family's published layout leaves to another repository, where many models have it from.

    name: as diffusers' pipelines call it
    folder: within a checkpoint, where it may have been put
    hub_id, inner: where it is had from otherwise, and the folder in there
    patterns: of the files that are downloaded
    """

    name: str
    folder: str
    hub_id: str
    patterns: tuple[str, ...]
    inner: str = ""


def no_defaults(layout: Layout, size: tuple[int, int] | None = None) -> Mapping[str, Any]:
    """Of a family whose defaults are the program's own."""
    return {}


def default_geometry(layout: Layout) -> Geometry:
    """Of a family which cuts videos as most do."""
    return DEFAULT_GEOMETRY


def text_alone(layout: Layout | None, kind: str | None = None) -> MediaInputs:
    """Of a family that makes videos of text alone."""
    return MediaInputs()


def as_asked(layout: Layout, given: tuple[int, int], asked: tuple[int, int]) -> tuple[int, int]:
    """Of a family whose videos have the size that is asked for, whatever the size of what is given."""
    return asked


def any_kind(layout: Layout) -> frozenset[str]:
    """Of a family with one kind of checkpoints, which has no name."""
    return frozenset()


def none_other(layout: Layout) -> tuple[str, ...]:
    """Of a family whose checkpoints run with one attention at every size."""
    return ()


@dataclass(frozen=True)
class Family:
    """A model family. docs/adding_a_model.md goes through the fields.

    name: as messages say it, after "only" and before "checkpoints are supported"
    recognise: the layout of a folder, by what its configurations and tensors say, never by its name. None for what
        another family may know; raises `CheckpointError` for what is of this one but cannot be used, saying why
    landmarks: files that together are in no folder but one in the family's published layout; for messages alone
    hub_files: what is downloaded of a checkpoint
    components_of: the models of a checkpoint, the transformers first
    tokenizers: their folders in the published layout, by those in diffusers'
    tokenizer_parts: files that together may stand for the one of a tokenizer, by its folder in diffusers' layout
    facts: reads what has to be known of a transformer off its configuration
    geometry_of: how a checkpoint cuts pixels into latents and tokens
    naming: what files from anyone call the tensors of its transformer
    transformers: a `TransformerSpec` for each class that its transformers are of, as "module:name", first that of
        those which are trained; imported when a transformer is there, since they name classes of diffusers, whose
        import takes seconds
    pipeline_of: the class that makes a checkpoint's videos, as "module:class"; imported when the first model is
        loaded, since a pipeline opens checkpoints itself and so stands above the list of families
    memory: what its models and videos take, for a plan of memory, as "module:function", see `wan.memory.planning`
    defaults: of a checkpoint, a layer of settings below those that it brings itself; for a video of a size
        (width, height) that is asked for, None where none is
    companions: what its published layout leaves to other repositories
    layout_of_file: the layout that a single file of weights tells, where the published one has no configuration
    kinds_of: which kinds of checkpoint one may be, as `kind` in the settings has them
    inputs_of: what a checkpoint is given beside the prompt, by its layout, or by the kind that settings name, or both;
        where neither tells, what it may be given is optional
    algorithms_at_other_sizes: attention that a checkpoint was published to run with, beside its own
    hub_landmarks: patterns of files that only its repositories have, for those without any configuration
    features: those of `FEATURES` that it supports
    fit_size: the size of a checkpoint's video, from that of the picture or video that it is given and the one asked
        for, each (width, height)
    training: the `TrainingSpec`, as "module:name", by name for the same reasons; empty for what cannot be trained
    """

    name: str
    recognise: Callable[[Path], Layout | None]
    landmarks: tuple[str, ...]
    hub_files: HubFiles
    components_of: Callable[[Layout], tuple[ComponentFiles, ...]]
    tokenizers: Mapping[str, str]
    facts: Callable[[Layout], TransformerFacts]
    naming: TransformerNaming
    transformers: tuple[str, ...]
    pipeline_of: Callable[[Layout], str]
    memory: str
    geometry_of: Callable[[Layout], Geometry] = default_geometry
    defaults: Callable[..., Mapping[str, Any]] = no_defaults
    companions: tuple[Companion, ...] = ()
    layout_of_file: Callable[[Path], Layout] | None = None
    kinds_of: Callable[[Layout], frozenset[str]] = any_kind
    inputs_of: Callable[[Layout | None, str | None], MediaInputs] = text_alone
    algorithms_at_other_sizes: Callable[[Layout], tuple[str, ...]] = none_other
    hub_landmarks: tuple[str, ...] = ()
    features: frozenset[str] = FEATURES
    fit_size: Callable[[Layout, tuple[int, int], tuple[int, int]], tuple[int, int]] = as_asked
    training: str = ""
    tokenizer_parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def load_pipeline(self, layout: Layout) -> type[Any]:
        """The class that makes a checkpoint's videos."""
        return _imported(self.pipeline_of(layout))

    def load_transformer_specs(self) -> tuple[TransformerSpec, ...]:
        """What `transformers` name."""
        return tuple(map(_imported, self.transformers))

    def load_training(self) -> Any:
        """What `training` names; raises `InputError` if it names nothing."""
        if not self.training:
            raise InputError(f"{self.name} cannot be trained here; use a checkpoint of another family")
        return _imported(self.training)

    def load_memory(self) -> Callable[..., Any]:
        """The function of `memory`."""
        return _imported(self.memory)

    def require(self, **asked: object) -> None:
        """Raise `InputError` for the first of `FEATURES` that is asked for, by a true value, and is not supported."""
        if unknown := asked.keys() - FEATURES:
            raise ValueError(f"{min(unknown)!r} is none of {sorted(FEATURES)}")
        for feature, wanted in asked.items():
            if wanted and feature not in self.features:
                raise InputError(f"{feature} is not supported for {self.name}; leave it out")


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
