"""From measurements to the error of each layer, stretch and share, and from these to a profile."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from nabla import InputError
from wan.tools.calibrate_attention.cost import Cost
from wan.tools.calibrate_attention.records import Record
from wan.tools.calibrate_attention.solve import Problem, solve
from wan.tools.calibrate_attention.stretches import Span, Walk

# Shares by layer, and such lists by stretch.
Keep = list[float]


@dataclass(frozen=True)
class Table:
    """Relative squared errors of the velocity in a step, by one layer at a share.

    spans: the stretches; shares: rising, all below 1
    errors: by stretch, layer and share
    """

    spans: tuple[Span, ...]
    shares: tuple[float, ...]
    errors: tuple[tuple[tuple[float, ...], ...], ...]

    @property
    def layers(self) -> int:
        return len(self.errors[0])

    @property
    def steps(self) -> int:
        return sum(span.steps for span in self.spans)

    def error(self, stretch: int, layer: int, share: float) -> float:
        """At any share: between those measured by a line of logarithms, and falling to none at 1."""
        known = list(zip(self.shares, self.errors[stretch][layer]))
        if share >= known[-1][0]:
            last, error = known[-1]
            return error * (1 - share) / (1 - last)
        if share <= known[0][0]:
            return known[0][1]
        (low, before), (high, after) = next(pair for pair in zip(known, known[1:]) if share <= pair[1][0])
        if share == high or min(before, after) <= 0:
            return after
        part = math.log(share / low) / math.log(high / low)
        return before * (after / before) ** part

    def predicted(self, keep: Sequence[Sequence[float]]) -> float:
        """The relative error of the velocity, mean over steps: squares of layers' errors add."""
        total = 0.0
        for stretch, (span, shares) in enumerate(zip(self.spans, keep)):
            squares = (self.error(stretch, layer, share) for layer, share in enumerate(shares))
            total += span.steps * math.sqrt(math.fsum(squares))
        return total / self.steps

    def uniform(self, share: float) -> list[Keep]:
        """One share for all layers and stretches."""
        return [[share] * self.layers for _ in self.spans]

    def mean_keep(self, keep: Sequence[Sequence[float]]) -> float:
        """The mean share over layers and steps of the stretches."""
        shares = (span.steps * sum(one) / self.layers for span, one in zip(self.spans, keep))
        return math.fsum(shares) / self.steps


def table_of(records: Sequence[Record], spans: Sequence[Span], walk: Walk, shares: Sequence[float]) -> Table:
    """The mean errors of all layers that are measured; see `outputs_of` for those not measured up to the velocity."""
    found: dict[tuple[int, int], list[Sequence[float]]] = defaultdict(list)
    for record, output in zip(records, outputs_of(records, walk)):
        span = walk.spans[record["step"]]
        assert span is not None, "dense steps are not measured"
        found[span, record["layer"]].append(output)
    layers = 1 + max(layer for _, layer in found)
    errors = tuple(
        tuple(tuple(map(statistics.fmean, zip(*found[span, layer]))) for layer in range(layers))
        for span in range(len(spans))
    )
    return Table(tuple(spans), tuple(shares), errors)


def outputs_of(records: Sequence[Record], walk: Walk) -> list[list[float]]:
    """The squared errors of the velocity of each record at each share.

    Where one was not measured it is the layer's own error times a gain: that of the nearest share at which both are
    known in the same stretch, in the mean over forwards.
    """
    gains: dict[tuple[int | None, int, int], list[tuple[float, float]]] = defaultdict(list)
    for record in records:
        for n, (own, output) in enumerate(zip(record["own"], record["output"])):
            if output is not None:
                gains[walk.spans[record["step"]], record["layer"], n].append((own, output))
    return [_outputs(record, walk, gains) for record in records]


def _outputs(
    record: Record, walk: Walk, gains: Mapping[tuple[int | None, int, int], Sequence[tuple[float, float]]]
) -> list[float]:
    span, layer = walk.spans[record["step"]], record["layer"]
    outputs = []
    for n, (own, output) in enumerate(zip(record["own"], record["output"])):
        if output is None:
            known = [other for other in range(len(record["own"])) if (span, layer, other) in gains]
            assert known, "each layer is measured up to the velocity in each stretch"
            pairs = gains[span, layer, min(known, key=lambda other: abs(other - n))]
            # Of sums, so that forwards in which next to nothing changes do not decide.
            before, after = (math.fsum(one) for one in zip(*pairs))
            output = own * after / before if before else 0.0
        outputs.append(output)
    return outputs


def solve_keep(table: Table, keep: float) -> list[Keep]:
    """The shares with the least error that keep so much in the mean. Raises `InputError` for less than is possible."""
    check_keep(keep, table.shares)
    choices = _choices(table, keep)
    costs = [[span.steps * Fraction(str(one)) for one in choices] for _, span, _ in _groups(table)]
    chosen = solve(Problem(_errors(table, choices), costs, Fraction(str(keep)) * table.layers * table.steps))
    # Costs are rounded up where they are many, so that even the least may be above a budget that they meet exactly.
    return table.uniform(keep) if chosen is None else _as_keep(table, choices, chosen)


def check_keep(keep: float, shares: Sequence[float]) -> None:
    """Raise `InputError` for a mean share that is below all shares, which rise."""
    if keep < shares[0]:
        raise InputError(f"keep {keep} is below {shares[0]}, the least of --shares; give more, or a less share")


def solve_milliseconds(
    table: Table, cost: Cost, calls: Sequence[int], budget: float, uniform: float
) -> list[Keep] | None:
    """The shares with the least error whose blocks take at most so long in all steps; None if none do.

    calls: forwards of a step, by stretch; uniform: a share that may be chosen besides those that are measured
    """
    choices = _choices(table, uniform)
    costs = [
        [_round(calls[stretch] * span.steps * cost.block(layer, one)) for one in choices]
        for stretch, span, layer in _groups(table)
    ]
    chosen = solve(Problem(_errors(table, choices), costs, _round(budget)))
    return None if chosen is None else _as_keep(table, choices, chosen)


def _round(milliseconds: float) -> float:
    # To microseconds, lest a unit of all of them be as small as floats have it.
    return round(milliseconds, 3)


def _choices(table: Table, uniform: float) -> list[float]:
    """What a layer may keep: a measured share, all, or what all keep in the profile that this is to be better than."""
    return sorted({*table.shares, uniform, 1.0})


def _groups(table: Table) -> list[tuple[int, Span, int]]:
    return [(stretch, span, layer) for stretch, span in enumerate(table.spans) for layer in range(table.layers)]


def _errors(table: Table, choices: Sequence[float]) -> list[list[float]]:
    """Of all steps of a stretch, by group and choice."""
    return [
        [span.steps * table.error(stretch, layer, share) for share in choices]
        for stretch, span, layer in _groups(table)
    ]


def _as_keep(table: Table, choices: Sequence[float], chosen: Sequence[int]) -> list[Keep]:
    shares = [choices[choice] for choice in chosen]
    return [shares[first : first + table.layers] for first in range(0, len(shares), table.layers)]
