"""Choosing shares: the least total error within a budget, one choice a layer and stretch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

# A budget is counted in at most so many units; costs that do not fit them are rounded up, by 0.001% of it each.
UNITS = 100_000


@dataclass(frozen=True)
class Problem:
    """A multiple-choice knapsack: of each group one choice is taken.

    errors, costs: of the choices of each group, none below zero; budget: what their costs may come to
    """

    errors: Sequence[Sequence[float]]
    costs: Sequence[Sequence[float | Fraction]]
    budget: float | Fraction

    @property
    def least_cost(self) -> float:
        return math.fsum(min(costs) for costs in self.costs)


def solve(problem: Problem) -> list[int] | None:
    """The choice of each group with which errors come to the least, by a table over all budgets; None for none.

    Exact where costs and budget are multiples of a unit of which the budget has at most `UNITS`; else costs are rounded
    up to such units, which never exceeds the budget.
    """
    costs, budget = _in_units(problem)
    if sum(min(each) for each in costs) > budget:
        return None
    # By what is left to spend, 0 to the budget: the least error of the groups so far, and what the last one takes.
    least = np.zeros(budget + 1)
    taken = np.zeros((len(costs), budget + 1), np.int16)
    for group, (errors, own) in enumerate(zip(problem.errors, costs)):
        best = np.full(budget + 1, np.inf)
        # Cheaper ones first, so that of equal errors the cheapest is kept.
        for choice in sorted(range(len(own)), key=lambda n: own[n]):
            cost = own[choice]
            if cost > budget:
                continue
            error = least[: budget + 1 - cost] + errors[choice]
            better = error < best[cost:]
            best[cost:][better] = error[better]
            taken[group, cost:][better] = choice
        least = best
    return _walk_back(taken, costs, budget)


def _walk_back(taken: np.ndarray, costs: Sequence[Sequence[int]], left: int) -> list[int]:
    choices = []
    for group in reversed(range(len(costs))):
        choice = int(taken[group, left])
        choices.append(choice)
        left -= costs[group][choice]
    return choices[::-1]


def _in_units(problem: Problem) -> tuple[list[list[int]], int]:
    # As they are written in decimals, so that 0.1 is a tenth.
    budget = Fraction(str(problem.budget))
    exact = [[Fraction(str(cost)) for cost in costs] for costs in problem.costs]
    unit = Fraction(1, math.lcm(budget.denominator, *(cost.denominator for costs in exact for cost in costs)))
    if budget > UNITS * unit:
        unit = budget / UNITS
    return [[math.ceil(cost / unit) for cost in costs] for costs in exact], int(budget / unit)
