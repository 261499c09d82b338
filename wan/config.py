"""The settings of a run: command line over YAML over checkpoint over the program's defaults, in one schema."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from nabla import InputError, NablaConfig

log = logging.getLogger("wan")

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"
VAE_STRIDE = (4, 8, 8)
PATCH = (1, 2, 2)
SOLVERS = ("unipc", "dpm++")
# The published program runs this many first steps dense when only a window is used.
STA_DENSE_STEPS = 12
DEFAULT_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)
_CHOICE = ("algorithm", "threshold", "keep", "window")


@dataclass(frozen=True)
class SamplingSettings:
    """How to walk from noise to latents. `seed` None draws one."""

    solver: str = "unipc"
    steps: int = 50
    shift: float = 5.0
    guide_scale: float = 5.0
    seed: int | None = None
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT

    def __post_init__(self) -> None:
        check_sampling(self.solver, self.steps, self.shift, self.guide_scale)
        if self.seed is not None and (not isinstance(self.seed, int) or not 0 <= self.seed < 2**63):
            raise InputError(f"seed {self.seed!r} is not a whole number from 0 to 2^63-1")
        if not isinstance(self.negative_prompt, str):
            raise InputError(f"negative_prompt {self.negative_prompt!r} is not a text")


@dataclass(frozen=True)
class VideoSettings:
    """size: (width, height) in pixels; frame_num: frames; fps: frames a second."""

    size: tuple[int, int] = (1280, 720)
    frame_num: int = 81
    fps: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", parse_size(self.size))
        check_video(self.size, self.frame_num)
        if not isinstance(self.fps, int) or self.fps < 1:
            raise InputError(f"fps {self.fps!r} is not a whole number of at least 1")


@dataclass(frozen=True)
class Settings:
    """Everything that decides a video. `checkpoint` is a directory or a hub id."""

    checkpoint: str
    prompt: str
    attention: NablaConfig = NablaConfig()
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    video: VideoSettings = field(default_factory=VideoSettings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values in the schema of the YAML files; `resolve` reads them back to equal settings."""
        attention = {key: value for key, value in asdict(self.attention).items() if key not in _CHOICE}
        return asdict(self) | {"attention": {"algorithm": self.attention.algorithm} | attention}


SECTIONS = {"attention": NablaConfig, "sampling": SamplingSettings, "video": VideoSettings}


def resolve(*layers: Mapping[str, Any]) -> Settings:
    """Settings from layers in the schema of the YAML files, the first layer first in rank.

    Raises `InputError` for unknown keys and values outside what is allowed.
    """
    merged: dict[str, Any] = {"attention": {}, "sampling": {}, "video": {}}
    for layer in reversed(layers):
        _check_keys("the settings", layer, {"checkpoint", "prompt", *SECTIONS})
        for key, value in layer.items():
            if key not in SECTIONS:
                merged[key] = value
                continue
            if not isinstance(value, Mapping):
                raise InputError(f"{key} {value!r} is not a mapping of settings")
            if key == "attention" and any(name in value for name in _CHOICE):
                merged[key] = {name: old for name, old in merged[key].items() if name not in _CHOICE}
            merged[key] |= value
    for name in ("sampling", "video"):
        _check_keys(name, merged[name], {item.name for item in fields(SECTIONS[name])})
    check_prompt(merged.get("prompt"))
    return Settings(
        checkpoint=str(merged["checkpoint"]),
        prompt=merged["prompt"],
        attention=attention_config(merged["attention"]),
        sampling=SamplingSettings(**merged["sampling"]),
        video=VideoSettings(**merged["video"]),
    )


def attention_config(settings: Mapping[str, Any]) -> NablaConfig:
    """An `attention` mapping to its config; a window alone runs its first steps dense unless `dense_steps` says else."""
    config = NablaConfig.from_dict(settings)
    if config.window is not None and not config.selects and "dense_steps" not in settings:
        return NablaConfig.from_dict({**settings, "dense_steps": STA_DENSE_STEPS})
    return config


def read_settings(name: str) -> dict[str, Any]:
    """A layer of settings from a YAML file, or from the JSON file beside a video.

    `name` is a path, or the name of a file in `configs/` whatever the working directory.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        path = CONFIG_FOLDER / name
    if not path.is_file():
        known = ", ".join(sorted(file.name for file in CONFIG_FOLDER.glob("*.yaml")))
        raise InputError(f"config {name!r} is neither a file nor one of {known}")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)["settings"] if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"config {path} cannot be read: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"config {path} does not hold a mapping of settings")
    return content


def parse_size(size: object) -> tuple[int, int]:
    """(width, height) from `1280*720`, `1280x720` or a pair."""
    parts = size.replace("x", "*").split("*") if isinstance(size, str) else size
    try:
        width, height = (int(part) for part in parts)
    except (TypeError, ValueError):
        raise InputError(f"size {size!r} is not of the form width*height, such as 1280*720") from None
    return width, height


def check_video(size: tuple[int, int], frame_num: int) -> None:
    """Raise `InputError` unless a video of `size` (width, height) and `frame_num` frames can be made, uncropped."""
    width, height = size
    rows, columns = (stride * patch for stride, patch in zip(VAE_STRIDE[1:], PATCH[1:]))
    if width < columns or height < rows or width % columns or height % rows:
        near = "*".join(str(max(n // m, 1) * m) for n, m in ((width, columns), (height, rows)))
        raise InputError(f"size {width}*{height}: both must be positive multiples of {rows}; the nearest below is {near}")
    step = VAE_STRIDE[0]
    if not isinstance(frame_num, int) or frame_num < 1 or frame_num % step != 1:
        near = max(0, (int(frame_num) - 1) // step) * step + 1 if isinstance(frame_num, (int, float)) else 81
        raise InputError(f"frame_num {frame_num} is not of the form {step}n+1; use {near} or {near + step}")


def check_sampling(solver: str, steps: int, shift: float, guide_scale: float) -> None:
    """Raise `InputError` for a solver that is not known or numbers outside what is allowed."""
    if solver not in SOLVERS:
        raise InputError(f"solver {solver!r} is not known; use one of {', '.join(SOLVERS)}")
    if not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps {steps!r} is not a whole number of at least 1; 50 is usual")
    if not isinstance(shift, (int, float)) or shift <= 0:
        raise InputError(f"shift {shift!r} is not a positive number; 5.0 is usual")
    if not isinstance(guide_scale, (int, float)) or guide_scale < 1:
        raise InputError(f"guide_scale {guide_scale!r} is not a number of at least 1 (1 means no guidance); 5.0 is usual")


def check_prompt(prompt: object) -> None:
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError("the prompt is empty; say what the video should show with --prompt")


def _check_keys(where: str, given: Mapping[str, Any], allowed: set[str]) -> None:
    if unknown := sorted(map(str, set(given) - allowed)):
        raise InputError(f"{where} has an unknown key {unknown[0]!r}; allowed are {', '.join(sorted(allowed))}")
