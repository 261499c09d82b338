"""The settings of a VAE's training: YAML -> frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from nabla import InputError
from wan.config.checks import parse_size
from wan.models.wan.geometry import GEOMETRY
from wan.training.config import PRECISIONS, OptimizerSettings
from wan.training.schema import (
    check_choice,
    check_counts,
    check_flags,
    check_mapping,
    check_numbers,
    check_texts,
    check_whole,
    from_mapping,
    to_plain,
)

# What may change between a run and its continuation: it changes no loss, or only those of steps to come.
CHANGEABLE = (
    "out",
    "steps",
    "validation",
    "compile",
    "statistics_clips",
    "dtype",
    "checkpoint_seconds",
    "log_steps",
    "workers",
)


@dataclass(frozen=True)
class CutSettings:
    """Batches of one size, cut at random places from longer or larger videos.

    batch: how many clips, over all processes; size: (width, height) of each in pixels; frames: of each
    drawn: (width, height) of the videos that they are cut from; None is `size`
    clips: how many such videos there are, all in memory where the training is
    share: how often such a batch comes, beside the shares of the others
    """

    batch: int
    size: tuple[int, int]
    frames: int
    drawn: tuple[int, int] | None = None
    clips: int = 1000
    share: float = 1.0

    def __post_init__(self) -> None:
        check_counts(self, "batch", "clips")
        check_numbers(self, "share", above=0)
        for name in ("size", "drawn"):
            given = getattr(self, name)
            object.__setattr__(self, name, parse_size(self.size if given is None else given))
        GEOMETRY.check_video(self.size, self.frames)
        if any(whole < part for whole, part in zip(self.drawn, self.size)):
            raise InputError(f"drawn {self.drawn} is smaller than the size {self.size} that is cut from it")


@dataclass(frozen=True)
class LossSettings:
    """Weights beside the mean absolute error, for videos in [-1, 1].

    squares: of the mean squared error, without which training is slow to leave the mean colour
    edges: of the absolute error of differences between neighbours along frames, rows and columns, which blur changes
    kl: of the divergence of the latents from a normal distribution, a latent
    """

    squares: float = 2.0
    edges: float = 0.3
    kl: float = 1e-4

    def __post_init__(self) -> None:
        check_numbers(self, "squares", "edges", "kl", least=0)


@dataclass(frozen=True)
class ValidationSettings:
    """Every so many steps, `clips` whole held-out videos of each of `sizes`, (width, height) in pixels."""

    every: int = 250
    clips: int = 8
    sizes: tuple[tuple[int, int], ...] = ((256, 256),)

    def __post_init__(self) -> None:
        check_counts(self, "every", "clips")
        if not isinstance(self.sizes, (list, tuple)) or not self.sizes:
            raise InputError(f"validation sizes {self.sizes!r} are not a list such as [256*256]")
        object.__setattr__(self, "sizes", tuple(map(parse_size, self.sizes)))


@dataclass(frozen=True)
class VaeSettings:
    """Everything that decides the training of a VAE on `shapes`.

    out: folder of the run
    cuts: the batches that steps are made of
    vae: sizes of the model, keys of diffusers' `AutoencoderKLWan`
    start: folder of a VAE of these sizes to go on from, such as the result of another run; None is a new one
    decoder_only: leave the encoder of `start` as it is, so that what learned from its latents goes on to fit
    video_frames: of the videos that clips are cut from and that validation sees whole
    matrix_lr: the learning rate of convolutions by Muon, beside that of `optimizer` for all else; None: all by AdamW
    compile: what a step computes, anew for every shape of its batches
    statistics_clips: how many training videos of the first validation size give the latents' mean and std
    dtype: of the weights that are written at the end
    checkpoint_seconds: between two checkpoints; log_steps: steps between two lines of the log
    workers: processes that draw videos
    """

    out: str
    steps: int
    cuts: tuple[CutSettings, ...]
    vae: dict[str, Any] = field(default_factory=lambda: {"base_dim": 16})
    start: str | None = None
    decoder_only: bool = False
    video_frames: int = 33
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    matrix_lr: float | None = None
    validation: ValidationSettings = ValidationSettings()
    ema: float = 0.999
    seed: int = 0
    precision: str = "bfloat16"
    compile: bool = False
    statistics_clips: int = 2048
    dtype: str = "float16"
    checkpoint_seconds: float = 60.0
    log_steps: int = 50
    workers: int = 0

    def __post_init__(self) -> None:
        check_texts(self, "out", *(["start"] if self.start is not None else []))
        if self.decoder_only is not False and (self.decoder_only is not True or self.start is None):
            raise InputError(f"decoder_only {self.decoder_only!r} must be true or false, and true beside a start alone")
        check_counts(self, "steps", "video_frames", "statistics_clips", "log_steps")
        check_counts(self, "workers", least=0)
        check_whole("seed", self.seed)
        check_numbers(self, "ema", above=0, most=1)
        check_numbers(self, "checkpoint_seconds", *(["matrix_lr"] if self.matrix_lr is not None else []), above=0)
        check_flags(self, "compile")
        check_choice(self, "precision", PRECISIONS)
        check_choice(self, "dtype", ("float16", "float32"))
        check_mapping("vae", self.vae)
        if not isinstance(self.cuts, (list, tuple)) or not self.cuts:
            raise InputError(f"cuts {self.cuts!r} are not a list of batch, size and frames")
        cuts = tuple(cut if isinstance(cut, CutSettings) else _cut(cut) for cut in self.cuts)
        object.__setattr__(self, "cuts", cuts)
        for size in self.validation.sizes:
            GEOMETRY.check_video(size, self.video_frames)
        if (longest := max(cut.frames for cut in cuts)) > self.video_frames:
            raise InputError(f"cuts of {longest} frames do not fit in videos of {self.video_frames} (video_frames)")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> VaeSettings:
        """Raises `InputError` for keys that are unknown or missing and for values outside what is allowed."""
        sections = {"loss": LossSettings, "optimizer": OptimizerSettings, "validation": ValidationSettings}
        return from_mapping(cls, settings, "the settings of train_vae", sections)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads back to equal settings."""
        return to_plain(asdict(self))


def _cut(content: object) -> CutSettings:
    check_mapping("cuts", content)
    return from_mapping(CutSettings, content, "cuts", {})
