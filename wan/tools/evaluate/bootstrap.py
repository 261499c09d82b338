"""Intervals for means by the bootstrap: percentiles of the means of samples drawn anew (Efron 1979)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

LEVEL, DRAWS, SEED = 0.95, 10_000, 0
# Numbers drawn at once.
MOST = 2**22


class Estimate(NamedTuple):
    """A mean and the interval that holds the true one in `LEVEL` of all such trials; None of fewer than two values.

    count: of values
    """

    mean: float
    low: float | None
    high: float | None
    count: int


def estimate(values: Iterable[float], draws: int = DRAWS, level: float = LEVEL) -> Estimate | None:
    """The mean of independent values, with its interval, the same each time; None of no values."""
    sample = np.fromiter(values, np.float64)
    if not len(sample):
        return None
    mean = float(sample.mean())
    if len(sample) == 1:
        return Estimate(mean, None, None, 1)
    # Of values that are all alike, sums in another order would differ by a rounding.
    if np.ptp(sample) == 0:
        return Estimate(float(sample[0]), float(sample[0]), float(sample[0]), len(sample))
    generator, means = np.random.default_rng(SEED), []
    rows = max(1, MOST // len(sample))
    for first in range(0, draws, rows):
        drawn = generator.integers(0, len(sample), (min(rows, draws - first), len(sample)))
        means.append(sample[drawn].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean, float(low), float(high), len(sample))


def by_prompt(values: Iterable[tuple[int, float]]) -> list[float]:
    """The mean of each prompt's values, given with its number: videos of one prompt are not independent."""
    groups: dict[int, list[float]] = defaultdict(list)
    for prompt, value in values:
        groups[prompt].append(value)
    return [float(np.mean(group)) for group in groups.values()]
