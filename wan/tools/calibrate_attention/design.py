"""What is measured: on which forwards of which walks, how, and how long that takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from wan.tools.calibrate_attention.cost import Cost
from wan.tools.calibrate_attention.records import Forward
from wan.tools.calibrate_attention.stretches import Span, Walk

# Where nothing else is asked for, all is measured exactly if that takes at most so many seconds.
EXACT_SECONDS = 900


@dataclass(frozen=True)
class Design:
    """prompts: how many are measured; checked: how many behind them a profile is checked on"""

    prompts: int
    checked: int
    spans: tuple[Span, ...]
    walk: Walk
    shares: tuple[float, ...]

    def forwards(self, calls: int, exact: bool) -> dict[Forward, tuple[float, ...]]:
        """Those that are measured, each with the shares at which the error of the velocity is.

        Not exact, they are of one guidance branch and the other in turns, and the velocity's error is measured in the
        first of each stretch, at the middle share.
        """
        found = {}
        for prompt in range(self.prompts):
            for number, step in enumerate(self.walk.measured):
                branches = range(calls) if exact else [(prompt + number) % calls]
                for branch in branches:
                    found[Forward(prompt, step, branch)] = self._whole(prompt, step, exact)
        return found

    def checked_forwards(self, calls: int) -> list[Forward]:
        """All of the prompts that a profile is checked on."""
        prompts = range(self.prompts, self.prompts + self.checked)
        return [Forward(*one) for one in product(prompts, self.walk.measured, range(calls))]

    def _whole(self, prompt: int, step: int, exact: bool) -> tuple[float, ...]:
        if exact:
            return self.shares
        is_first = prompt == 0 and step == self.walk.of(self.span_at(step))[0]
        return (self.shares[len(self.shares) // 2],) if is_first else ()

    def span_at(self, step: int) -> int:
        """The number of the stretch that a step of the walk stands for."""
        span = self.walk.spans[step]
        assert span is not None, "dense steps are not measured"
        return span

    def seconds(self, cost: Cost, exact: bool) -> float:
        """All measurements and their walks, about."""
        every = self.forwards(cost.calls, exact)
        measuring = sum(ms for whole in every.values() for ms in layer_milliseconds(cost, self.shares, whole))
        dense = cost.forward([1.0] * cost.layers)
        walks = self.prompts * self.walk.steps * cost.calls * dense
        # A check runs the profile and one share for all beside the dense forward.
        checks = self.checked * cost.calls * dense * (self.walk.steps + 2 * len(self.walk.measured))
        return (measuring + walks + checks) / 1000


def layer_milliseconds(cost: Cost, shares: Sequence[float], whole: Sequence[float]) -> Iterator[float]:
    """How long each layer of a forward takes to measure, beside the dense forward."""
    behind = sum(cost.block(layer, 1) for layer in range(cost.layers))
    for layer in range(cost.layers):
        behind -= cost.block(layer, 1)
        own = sum(cost.block(layer, share) for share in shares)
        yield own + sum(cost.block(layer, share) + behind + cost.outside for share in whole)
