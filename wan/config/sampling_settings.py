"""How a video is sampled, as settings have it."""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from nabla import InputError
from nabla.checks import is_count
from wan.config.checks import check_context_scale, check_sampling, check_text, guide_scale_text, parse_guide_scale

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Of the published program's configuration (`sample_neg_prompt`).
DEFAULT_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)
# Seeds that are drawn are below this; those that are given may be any up to 2^63-1.
MAX_SEED = 2**31


@dataclass(frozen=True)
class SamplingSettings:
    """How to walk from noise to latents. `seed` None or -1 draws one.

    guide_scale: of all steps, or that of the low-noise expert's and that of the high-noise expert's, as published
    context_scale: of what a source video adds in each layer, for checkpoints that take one
    """

    solver: str = "unipc"
    steps: int = 50
    shift: float = 5.0
    guide_scale: float | tuple[float, float] = 5.0
    seed: int | None = None
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    context_scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "guide_scale", parse_guide_scale(self.guide_scale))
        check_sampling(self.solver, self.steps, self.shift, self.guide_scale)
        check_context_scale(self.context_scale)
        if self.seed not in (None, -1) and not (is_count(self.seed) and self.seed < 2**63):
            raise InputError(f"seed {self.seed!r} is not a whole number from 0 to 2^63-1, or -1 to draw one")
        check_text("negative_prompt", self.negative_prompt)

    @property
    def guided(self) -> bool:
        """Whether any step runs with guidance, so that there has to be a negative prompt."""
        return any(scale != 1 for scale in self.guide_scales)

    @property
    def guide_scales(self) -> tuple[float, ...]:
        """That of all experts or, where they have their own, of each, in the order in which these run."""
        return self.guide_scale[::-1] if isinstance(self.guide_scale, tuple) else (self.guide_scale,)

    @property
    def plain_guide_scale(self) -> float | list[float]:
        """As JSON has it."""
        return list(self.guide_scale) if isinstance(self.guide_scale, tuple) else self.guide_scale

    def guide_scale_of(self, expert: int) -> float:
        """That of the steps of an expert, by its place in the order in which they run."""
        return self.guide_scales[min(expert, len(self.guide_scales) - 1)]

    def check_experts(self, count: int) -> None:
        """Raise `InputError` for a pair of scales where there is one transformer for all steps."""
        if count == 1 and len(self.guide_scales) > 1:
            raise InputError(
                f"guide_scale {guide_scale_text(self.guide_scale)} is for a checkpoint of two experts, and this one "
                f"has one transformer; give one number, such as {self.guide_scale_of(0):g}"
            )

    def with_seed(self) -> SamplingSettings:
        """The same with a seed drawn, if it says to draw one."""
        return replace(self, seed=secrets.randbelow(MAX_SEED)) if self.seed in (None, -1) else self

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what came later is left out by default, as of `Settings.to_dict`."""
        return without_default(self, "context_scale")


def without_default(section: DataclassInstance, key: str) -> dict[str, Any]:
    """The fields of a section by name, but one that has its default."""
    usual = next(item.default for item in fields(section) if item.name == key)
    return {name: value for name, value in asdict(section).items() if name != key or value != usual}
