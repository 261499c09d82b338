"""The settings of a training run and of the preparation of its data: YAML -> frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from nabla import InputError, NablaConfig
from nabla.checks import is_number
from wan.config.attention_settings import attention_config, attention_to_dict
from wan.config.geometry import DEFAULT_GEOMETRY, Geometry
from wan.config.model_settings import EXPERTS
from wan.config.prompts import check_prompt
from wan.config.settings import SamplingSettings, VideoSettings
from wan.training.objective_settings import ObjectiveSettings
from wan.training.schema import (
    ComponentPlaces,
    check_choice,
    check_counts,
    check_flags,
    check_mapping,
    check_numbers,
    check_texts,
    check_whole,
    from_mapping,
    merge_settings,
    text_tuple,
    to_plain,
)

MODES = ("pretrain", "finetune", "distill")
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("bfloat16", "float32")
# The published settings of NABLA's distillation (arXiv 2507.13546).
MODE_DEFAULTS: dict[str, dict[str, Any]] = {
    "pretrain": {},
    "finetune": {},
    "distill": {"steps": 1600, "batch_size": 64, "optimizer": {"lr": 1e-6, "clip": 0.01}},
}
# What may change between a run and its continuation: it changes no loss, or only those of steps to come.
CHANGEABLE = (
    "out",
    "steps",
    "micro_batch",
    "shard",
    "compile",
    "gradient_checkpointing",
    "every",
    "keep_last",
    "workers",
    "samples",
)


@dataclass(frozen=True)
class DataSettings:
    """Folders that prepare_data.py wrote; `clips` is how many of `validation` to use.

    train: one, or several that are taken together
    """

    train: str | tuple[str, ...]
    validation: str | None = None
    clips: int = 32

    def __post_init__(self) -> None:
        folders = (self.train,) if isinstance(self.train, str) else text_tuple("train", self.train)
        if not folders or not all(folders):
            raise InputError(f"train {self.train!r} names no folder; give one that prepare_data.py wrote, or a list")
        object.__setattr__(self, "train", folders)
        check_texts(self, *(["validation"] if self.validation is not None else []))
        check_counts(self, "clips")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW; `clip` is the largest norm of a gradient, `warmup` the steps of rising learning rate before `schedule`."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    schedule: str = "constant"
    warmup: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, "lr", "eps", "clip", above=0)
        check_numbers(self, "weight_decay", least=0)
        betas = self.betas
        if (
            not isinstance(betas, (list, tuple))
            or len(betas) != 2
            or not all(is_number(b) and 0 <= b < 1 for b in betas)
        ):
            raise InputError(f"betas {betas!r} are not two numbers from 0 to below 1; (0.9, 0.95) are usual")
        object.__setattr__(self, "betas", tuple(map(float, betas)))
        check_choice(self, "schedule", SCHEDULES)
        check_counts(self, "warmup", least=0)


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters, scaled by alpha / rank, on the linear layers whose names end in one of `targets`.

    targets: None for what is usual for the checkpoint's family, all linear layers of the blocks
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_counts(self, "rank")
        check_numbers(self, "alpha", above=0)
        if self.targets is None:
            return
        object.__setattr__(self, "targets", text_tuple("lora targets", self.targets))
        if not self.targets:
            raise InputError("lora targets [] name no layer; leave them out for all linear layers of the blocks")


@dataclass(frozen=True)
class EverySettings:
    """After how many steps each of these is done; checkpoints, validation and samples come at the end too."""

    log: int = 10
    checkpoint: int = 200
    validation: int = 200
    sample: int = 1000

    def __post_init__(self) -> None:
        check_counts(self, "log", "checkpoint", "validation", "sample")


class ResolvedSamples(NamedTuple):
    """Videos made on the way, one a prompt."""

    prompts: tuple[str, ...]
    sampling: SamplingSettings
    video: VideoSettings


@dataclass(frozen=True)
class SampleSettings:
    """Videos made on the way, one a prompt.

    sampling, video: as in every config, and what is left out as the run's checkpoint has it, but seed 0. Checkpoints
        name what is given here as generate.py's defaults for them
    """

    prompts: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    video: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", text_tuple("prompts", self.prompts))
        for prompt in self.prompts:
            check_prompt(prompt, "in samples")
        for name in ("sampling", "video"):
            check_mapping(name, getattr(self, name))
            object.__setattr__(self, name, {k: v for k, v in getattr(self, name).items() if v is not None})
        # Checked without a checkpoint's defaults too, so that a wrong value is found before anything is opened.
        seed = self.over({}).sampling.seed
        if seed in (None, -1):
            raise InputError(f"samples seed {seed!r} would change from sample to sample; give a number")

    def over(self, defaults: Mapping[str, Any], geometry: Geometry = DEFAULT_GEOMETRY) -> ResolvedSamples:
        """These over a checkpoint's defaults, of its geometry.

        Raises `InputError` for what is unknown or not allowed in either.
        """
        made: dict[str, Any] = {}
        for name, kind in (("sampling", SamplingSettings), ("video", VideoSettings)):
            lower = defaults.get(name) or {}
            check_mapping(name, lower)
            # Over the checkpoint's, which may be a random one; samples of different steps are to differ by the weights
            # alone.
            seed = {"seed": 0} if name == "sampling" else {}
            made[name] = from_mapping(kind, {**lower, **seed, **getattr(self, name)}, name, {})
        made["video"] = replace(made["video"], geometry=geometry)
        return ResolvedSamples(self.prompts, **made)


@dataclass(frozen=True)
class TrainingSettings(ComponentPlaces):
    """Everything that decides a training run.

    checkpoint: where the run starts: directory or hub id of weights, VAE and text encoder
    transformer: for `pretrain`, the sizes of a new transformer (keys of diffusers' class); without it, training goes on
        from the checkpoint's weights
    expert: of a checkpoint of two transformers, which is trained, "high" or "low"
    attention: of what is trained; the teacher of `distill` is dense
    matrix_lr: the learning rate of the blocks' matrices by Muon, beside that of `optimizer` for all else; None: all by
        AdamW
    batch_size: clips a step over all processes; micro_batch: clips that a process takes at once
    ema: decay of the moving average of the weights, or None for none
    shard: spread weights, gradients and optimizer over the processes (FSDP2), rather than repeat them (DDP)
    keep_last: how many checkpoints stay
    workers: processes that read clips, for each process that trains
    """

    mode: str
    checkpoint: str
    out: str
    steps: int
    data: DataSettings
    transformer: dict[str, Any] | None = None
    expert: str | None = None
    attention: NablaConfig = NablaConfig()
    lora: LoraSettings | None = None
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    matrix_lr: float | None = None
    batch_size: int = 8
    micro_batch: int = 1
    seed: int = 0
    precision: str = "bfloat16"
    gradient_checkpointing: bool = True
    compile: bool = False
    shard: bool = False
    ema: float | None = None
    every: EverySettings = EverySettings()
    keep_last: int = 3
    workers: int = 2
    samples: SampleSettings | None = None

    def __post_init__(self) -> None:
        check_choice(self, "mode", MODES)
        check_choice(self, "precision", PRECISIONS)
        check_texts(self, "checkpoint", "out", *self.components)
        check_counts(self, "steps", "batch_size", "micro_batch", "keep_last")
        check_counts(self, "workers", least=0)
        check_whole("seed", self.seed)
        check_flags(self, "gradient_checkpointing", "compile", "shard")
        if self.expert is not None:
            check_choice(self, "expert", EXPERTS)
        if self.ema is not None:
            check_numbers(self, "ema", above=0, most=1)
        if self.transformer is not None and (self.mode != "pretrain" or not isinstance(self.transformer, Mapping)):
            raise InputError("transformer is a mapping of sizes for a new one, in mode pretrain; leave it out")
        if self.lora is not None and self.mode == "pretrain":
            raise InputError("lora adapts weights that are there already; use mode finetune or distill")
        if self.matrix_lr is not None:
            check_numbers(self, "matrix_lr", above=0)
            if self.shard or self.lora is not None:
                other = "shard" if self.shard else "lora"
                raise InputError(
                    f"matrix_lr does not go with {other}: Muon takes whole matrices; leave one of them out"
                )
        if self.mode == "distill" and self.attention.is_dense:
            raise InputError("distill teaches sparse attention; set attention, such as {algorithm: nabla-0.7}")
        if self.attention.profile is not None:
            raise InputError("profile is about the steps of sampling; train with keep, and sample with the profile")
        if self.attention.dense_steps or self.attention.mask_refresh > 1:
            raise InputError("dense_steps and mask_refresh are about the steps of sampling; leave them out of training")
        if self.attention.dropped != "none":
            raise InputError(
                f"attention dropped {self.attention.dropped!r} is for sampling: no fast kernel has its gradients; "
                "leave it out of training"
            )

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> TrainingSettings:
        """Settings from the content of a YAML file, over the defaults of its mode.

        Raises `InputError` for keys that are unknown or missing and for values outside what is allowed.
        """
        settings = merge_settings(MODE_DEFAULTS.get(str(settings.get("mode")), {}), settings)
        sections = {
            "data": DataSettings,
            "lora": LoraSettings,
            "objective": ObjectiveSettings,
            "optimizer": OptimizerSettings,
            "every": EverySettings,
            "samples": SampleSettings,
        }
        if settings.get("attention") is not None:
            check_mapping("attention", settings["attention"])
            # A window alone would get dense first steps, which are refused in training.
            settings["attention"] = attention_config({"dense_steps": 0} | settings["attention"])
        return from_mapping(cls, settings, "the training settings", sections)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads back to equal settings."""
        return to_plain(asdict(self) | {"attention": attention_to_dict(self.attention)})
