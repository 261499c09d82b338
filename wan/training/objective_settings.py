"""The settings of what is learned of a clip: how noisy it is, and what of it is given."""

from __future__ import annotations

from dataclasses import dataclass

from nabla import InputError
from wan.training.schema import check_choice, check_numbers

TIMESTEPS = ("logit_normal", "uniform")
# Of no noise to nothing but noise, as `wan.sampling.solvers` has them, without the libraries that it needs.
ALL_TIMESTEPS = 1000


@dataclass(frozen=True)
class ObjectiveSettings:
    """How noise levels are drawn, and how often a clip goes without its text.

    timesteps: distribution before shifting: uniform, or logistic of a normal of `mean` and std `deviation`
    shift: as in sampling, sigma = shift s / (1 + (shift - 1) s)
    min_timestep, max_timestep: of 0 to 1000, those between which levels are drawn, as often among themselves as ever;
        None: no limit, and of an expert's training that of its own range
    text_dropout: share of clips that see the states of an empty text instead of their own
    first_frame: share of clips whose first latent frame is given, without noise, as of a video that begins with a
        picture; what is learned is the others. For transformers that take such
    """

    timesteps: str = "logit_normal"
    mean: float = 0.0
    deviation: float = 1.0
    shift: float = 5.0
    min_timestep: float | None = None
    max_timestep: float | None = None
    text_dropout: float = 0.1
    first_frame: float = 0.0

    def __post_init__(self) -> None:
        check_choice(self, "timesteps", TIMESTEPS)
        check_numbers(self, "mean")
        check_numbers(self, "deviation", "shift", above=0)
        check_numbers(self, "text_dropout", "first_frame", least=0, most=1)
        for name in ("min_timestep", "max_timestep"):
            if getattr(self, name) is not None:
                check_numbers(self, name, least=0, most=ALL_TIMESTEPS)
        low, high = self.timestep_range
        if low >= high:
            raise InputError(f"min_timestep {low:g} is not below max_timestep {high:g}; noise levels lie between them")

    @property
    def timestep_range(self) -> tuple[float, float]:
        """The timesteps between which levels are drawn."""
        low = 0 if self.min_timestep is None else self.min_timestep
        return low, ALL_TIMESTEPS if self.max_timestep is None else self.max_timestep
