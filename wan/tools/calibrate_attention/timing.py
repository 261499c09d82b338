"""How long a video takes with a profile, by what was timed of a forward and of the stages around the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nabla import InputError
from wan.tools.calibrate_attention.cost import Cost
from wan.tools.calibrate_attention.table import Keep, Table, solve_milliseconds

# Of the share that takes a given time, which is looked for by halving.
HALVINGS = 40


@dataclass(frozen=True)
class VideoTime:
    """calls: forwards of a step in each of the table's stretches
    dense_calls: forwards of all steps before these, which are dense; around: seconds of the text and the decoder
    """

    table: Table
    cost: Cost
    calls: tuple[int, ...]
    dense_calls: int
    around: float

    def seconds(self, keep: Sequence[Sequence[float]]) -> float:
        """Of a whole video whose layers keep these shares by stretch; without loading."""
        forwards = sum(
            calls * span.steps * self.cost.forward(shares)
            for calls, span, shares in zip(self.calls, self.table.spans, keep)
        )
        return self._fixed + (forwards - self._outside) / 1000

    def solve(self, seconds: float) -> list[Keep]:
        """The shares with the least error in a video of so many seconds. Raises `InputError` if that is too short."""
        budget, uniform = 1000 * (seconds - self._fixed), self.uniform_share(seconds)
        found = solve_milliseconds(self.table, self.cost, self.calls, budget, uniform)
        if found is None:
            least = min(self.table.shares, key=lambda share: self.seconds(self.table.uniform(share)))
            raise InputError(
                f"seconds {seconds:g} is too short: a video takes {self.seconds(self.table.uniform(least)):.1f} s here "
                f"with a share of {least:g} in all layers; give more, a less share in --shares, or a smaller video"
            )
        return found

    def uniform_share(self, seconds: float) -> float:
        """The greatest share with which a video takes at most so long if all layers keep it; or the least measured."""
        low, high = self.table.shares[0], 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if self.seconds(self.table.uniform(middle)) <= seconds:
                low = middle
            else:
                high = middle
        return round(low, 4)

    @property
    def _outside(self) -> float:
        """Milliseconds of what is outside of blocks in the stretches' forwards."""
        return self.cost.outside * sum(n * span.steps for n, span in zip(self.calls, self.table.spans))

    @property
    def _fixed(self) -> float:
        """Seconds of all but the blocks of the stretches."""
        dense = self.dense_calls * self.cost.forward([1.0] * self.cost.layers)
        return self.around + (dense + self._outside) / 1000


def video_time(
    table: Table, cost: Cost, stages: Mapping[str, Any], dense_steps: int, scales: Sequence[float]
) -> VideoTime:
    """Of measurements; stages: seconds by name; scales: guidance of each expert"""

    def calls_of(expert: int) -> int:
        return 1 if scales[min(expert, len(scales) - 1)] == 1 else cost.calls

    calls = tuple(calls_of(span.expert) for span in table.spans)
    return VideoTime(table, cost, calls, dense_steps * calls_of(0), stages["text"] + stages["decode"])
