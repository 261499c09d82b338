"""The settings of a run: command line over YAML over checkpoint over the program's defaults, in one schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from nabla import InputError, NablaConfig
from nabla.checks import is_count
from wan.config.attention_settings import attention_config, attention_to_dict, merge_attention
from wan.config.cache_settings import CacheSettings
from wan.config.checks import check_keys, parse_size
from wan.config.geometry import DEFAULT_GEOMETRY, Geometry
from wan.config.inputs import INPUTS, Files, inputs_of
from wan.config.model_settings import ExpertFiles, LoraFile, ModelSettings
from wan.config.prompts import check_expanded, check_prompt
from wan.config.sampling_settings import SamplingSettings, without_default

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

MAX_FPS = 240
# What the text of an expanded prompt was made of: a layer that names one of these leaves out a lower layer's text.
_EXPANDED_FROM = ("prompt", "image", "expand_prompt")


@dataclass(frozen=True)
class VideoSettings:
    """size: (width, height) in pixels; frame_num: frames; fps: frames a second.

    exact_size: whether a video that begins with a picture, or is made of another, has this very size; else it has the
        picture's form in about the same area
    geometry: of the family that makes it, which says what sizes and counts of frames there are
    """

    size: tuple[int, int] = (1280, 720)
    frame_num: int = 81
    fps: int = 16
    exact_size: bool = False
    # No field, so that it is neither compared nor written to records; `replace` hands it on all the same.
    geometry: InitVar[Geometry] = DEFAULT_GEOMETRY

    def __post_init__(self, geometry: Geometry) -> None:
        object.__setattr__(self, "geometry", geometry)
        object.__setattr__(self, "size", parse_size(self.size))
        geometry.check_video(self.size, self.frame_num)
        if not is_count(self.fps) or not 1 <= self.fps <= MAX_FPS:
            raise InputError(f"fps {self.fps!r} is not a whole number from 1 to {MAX_FPS}; 16 is usual")
        if not isinstance(self.exact_size, bool):
            raise InputError(f"exact_size {self.exact_size!r} is neither true nor false")

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what came later is left out by default, as of `Settings.to_dict`."""
        return without_default(self, "exact_size")

    @property
    def latents_size(self) -> tuple[int, int, int]:
        """(frames, height, width) of the video's latents."""
        return self._geometry.latents_size(self.size, self.frame_num)

    @property
    def token_grid(self) -> tuple[int, int, int]:
        """(frames, rows, columns) of the tokens that the transformer sees."""
        return self._geometry.token_grid(self.size, self.frame_num)

    @property
    def _geometry(self) -> Geometry:
        return self.geometry  # type: ignore[attr-defined]  # kept above, which a type checker does not see

    def check_positions(self, most: int) -> None:
        """Raise `InputError` for a video longer on some axis than a rotary table of `most` positions."""
        self._geometry.check_positions(self.size, self.frame_num, most)


def changed(settings: T, **values: Any) -> T:
    """Settings with other values, but for those that are None."""
    # What is the very value that they have was checked when they were made.
    others = {key: value for key, value in values.items() if value is not None and value is not getattr(settings, key)}
    return replace(settings, **others) if others else settings


@dataclass(frozen=True)
class Settings:
    """All that decides a video: what runs, what it shows, how it is sampled and how large it is.

    Each of these was checked when it was made, so nothing is here: settings with another seed cost no second look.
    prompt: None where none is said yet, as in a preset
    image, last_image: absolute paths of the pictures that the video begins and ends with
    src_video, src_mask: of a video that it keeps parts of, and of one that says by white where it makes others
    src_ref_images: of pictures of what it shows
    expand_prompt: whether the checkpoint's language model rewrites the prompt first
    expanded_prompt: what it wrote, where that is known: the video is made of this text then, and none is written anew
    """

    model: ModelSettings
    prompt: str | None = None
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    video: VideoSettings = field(default_factory=VideoSettings)
    image: str | None = None
    expand_prompt: bool = False
    expanded_prompt: str | None = None
    last_image: str | None = None
    src_video: str | None = None
    src_mask: str | None = None
    src_ref_images: tuple[str, ...] = ()

    @property
    def inputs(self) -> dict[str, Files]:
        """The files that the video is made of beside its prompt, by the names of `INPUTS`."""
        return {name: given for name in INPUTS if (given := getattr(self, name))}

    @property
    def writes_prompt(self) -> bool:
        """Whether the language model has to write the text that the video is made of."""
        return self.expand_prompt and self.expanded_prompt is None

    @property
    def text(self) -> str:
        """What the text encoders are given."""
        return self.expanded_prompt or self.prompt or ""

    @property
    def checkpoint(self) -> str:
        return self.model.checkpoint

    @property
    def transformer(self) -> str | ExpertFiles | None:
        return self.model.transformer

    @property
    def lora(self) -> tuple[LoraFile, ...]:
        return self.model.lora

    @property
    def dtype(self) -> str | None:
        return self.model.dtype

    @property
    def vae_dtype(self) -> str | None:
        return self.model.vae_dtype

    @property
    def fp8(self) -> bool:
        return self.model.fp8

    @property
    def cache(self) -> CacheSettings | None:
        return self.model.cache

    @property
    def attention(self) -> NablaConfig:
        return self.model.attention

    def with_seed(self) -> Settings:
        """The same with a seed drawn, if they say to draw one."""
        return replace(self, sampling=self.sampling.with_seed())

    def to_dict(self) -> dict[str, Any]:
        """Plain values in the schema of the YAML files; `resolve` reads them back to equal settings."""
        model = _plain_model(self.model)
        values = {"checkpoint": model.pop("checkpoint"), "prompt": self.prompt} | model
        # Left out of settings without them, whose names and records stay what they were before there were these keys.
        values |= self.inputs
        values |= {"expand_prompt": True} if self.expand_prompt else {}
        values |= {} if self.expanded_prompt is None else {"expanded_prompt": self.expanded_prompt}
        # Where there is no cache, a layer below would say which.
        values |= {"cache": model["cache"] or "none", "attention": attention_to_dict(self.attention)}
        return values | {"sampling": self.sampling.to_dict(), "video": self.video.to_dict()}


def _plain_model(settings: ModelSettings) -> dict[str, Any]:
    """As plain values, without those of experts where none are named: records without them stay what they were."""
    values = asdict(settings)
    if isinstance(settings.transformer, ExpertFiles):
        values["transformer"] = dict(settings.transformer_files)
    without = [{key: value for key, value in one.items() if key != "expert" or value} for one in values["lora"]]
    return values | {"lora": tuple(without)}


def writers_of(several: Sequence[Settings]) -> tuple[bool, bool]:
    """Whether the language model has to write the text of one of several videos, and for a picture."""
    written = [one for one in several if one.writes_prompt]
    return bool(written), any(one.image is not None for one in written)


SECTIONS = {"attention": NablaConfig, "sampling": SamplingSettings, "video": VideoSettings}
KEYS = {item.name for kind in (ModelSettings, Settings) for item in fields(kind)} - {"model"}


def resolve(*layers: Mapping[str, Any], geometry: Geometry = DEFAULT_GEOMETRY, needs_prompt: bool = True) -> Settings:
    """Settings from layers in the schema of the YAML files, the first layer first in rank.

    geometry: of the family that makes the video
    needs_prompt: else theirs is left out, and there need be none; so is what goes with it, its files and its text
    Raises `InputError` for unknown keys and values outside what is allowed.
    """
    merged = _merged(layers)
    attention = attention_config(merged.pop("attention"))
    sampling = SamplingSettings(**merged.pop("sampling"))
    video = VideoSettings(**merged.pop("video"), geometry=geometry)
    prompt, files = merged.pop("prompt"), {name: merged.pop(name) for name in INPUTS}
    expand, expanded = merged.pop("expand_prompt"), merged.pop("expanded_prompt")
    if needs_prompt:
        # Before what opens files.
        check_prompt(prompt)
    check_expanded(expand, expanded)
    inputs: dict[str, Any] = dict(inputs_of(files))
    model = ModelSettings(**merged, attention=attention)
    if not needs_prompt:
        return Settings(model, None, sampling, video, expand_prompt=expand)
    return Settings(model, prompt, sampling, video, expand_prompt=expand, expanded_prompt=expanded, **inputs)


def resolve_sampling(*layers: Mapping[str, Any]) -> SamplingSettings:
    """`resolve` of what layers say of sampling alone."""
    return SamplingSettings(**_merged(layers)["sampling"])


def resolve_video(*layers: Mapping[str, Any], geometry: Geometry = DEFAULT_GEOMETRY) -> VideoSettings:
    """`resolve` of what layers say of the video's size alone."""
    return VideoSettings(**_merged(layers)["video"], geometry=geometry)


def size_in(layers: Sequence[Mapping[str, Any]]) -> tuple[int, int] | None:
    """The (width, height) that the first of layers to say one has; None where none does."""
    sections = [layer.get("video") for layer in layers]
    sizes = [video["size"] for video in sections if isinstance(video, Mapping) and video.get("size") is not None]
    return parse_size(sizes[0]) if sizes else None


def _merged(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One layer of several, with a mapping for each section, whose keys are known."""
    merged: dict[str, Any] = {"checkpoint": None, "prompt": None, **{name: {} for name in SECTIONS}}
    merged |= dict.fromkeys(INPUTS)
    merged |= {"expand_prompt": False, "expanded_prompt": None}
    # From the lowest in rank upwards, so that each writes over those below. None is a flag that was not given.
    for layer in reversed(layers):
        check_keys("the settings", layer, KEYS)
        if any(layer.get(key) is not None for key in _EXPANDED_FROM):
            merged["expanded_prompt"] = None
        for key, value in layer.items():
            if value is not None:
                merged[key] = _merge(key, merged[key], value) if key in SECTIONS else value
    # Those of `attention` are for `NablaConfig.from_dict` to check.
    for name in ("sampling", "video"):
        check_keys(name, merged[name], {item.name for item in fields(SECTIONS[name])})
    return merged


def _merge(section: str, lower: dict[str, Any], upper: object) -> dict[str, Any]:
    if section == "attention":
        return merge_attention(lower, upper)
    if not isinstance(upper, Mapping):
        raise InputError(f"{section} {upper!r} is not a mapping of settings")
    return {**lower, **{key: value for key, value in upper.items() if value is not None}}
