"""The stretches of a run's steps that get shares of their own, and the shorter walk on which they are measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nabla import InputError
from wan.config.settings import SamplingSettings
from wan.sampling.experts import experts_of
from wan.sampling.solvers import make_solver


@dataclass(frozen=True)
class Span:
    """Steps from `begin` on, `end` not included, all of one expert: its place among a pipeline's transformers."""

    begin: int
    end: int
    expert: int = 0

    @property
    def steps(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Walk:
    """A walk from noise to latents of fewer steps than a run's, on the same schedule.

    steps: how many there are; spans: for each the number of the stretch that it stands for, None for one that is dense
    """

    steps: int
    spans: tuple[int | None, ...]

    def of(self, span: int) -> list[int]:
        """The walk's steps that stand for a stretch."""
        return [step for step, number in enumerate(self.spans) if number == span]

    @property
    def measured(self) -> list[int]:
        """Those that stand for any."""
        return [step for step, number in enumerate(self.spans) if number is not None]


def spans_of(sampling: SamplingSettings, boundary: float | None, dense: int, count: int) -> list[Span]:
    """The stretches of a run's steps behind the first `dense` ones, in about `count` equal parts.

    None holds steps of two experts, so that where these swap one ends. Raises `InputError` for more than there are
    steps.
    """
    experts = _experts(sampling, sampling.steps, boundary)
    steps = sampling.steps - dense
    if steps < 1:
        raise InputError(f"dense_steps leaves {sampling.steps} steps nothing to measure; lower it in the config")
    if not 1 <= count <= steps:
        raise InputError(f"stretches {count}: {steps} steps are not dense already; give 1 to {steps}")
    edges = [dense + round(steps * part / count) for part in range(count + 1)]
    swaps = [step for step in range(dense + 1, sampling.steps) if experts[step] != experts[step - 1]]
    for swap in swaps:
        edges = _with_edge(edges, swap)
    return [Span(begin, end, experts[begin]) for begin, end in zip(edges, edges[1:])]


def _with_edge(edges: list[int], swap: int) -> list[int]:
    """Edges of which the inner one that is nearest is moved to where experts swap; it is added where none is inner."""
    if swap in edges:
        return edges
    inner = edges[1:-1]
    moved = min(inner, key=lambda edge: abs(edge - swap)) if inner else None
    return sorted({edge for edge in edges if edge != moved} | {swap})


def walk_of(sampling: SamplingSettings, boundary: float | None, spans: Sequence[Span], least: int) -> Walk:
    """The shortest walk of at least so many steps, and at most the run's own, that has a step in each stretch.

    Noise levels depend on the share of the steps that are done, so that a step of a short walk sees what a long one
    sees at the same share.
    """
    for steps in range(min(least, sampling.steps), sampling.steps):
        walk = Walk(steps, _spans_at(sampling, boundary, spans, steps))
        if all(walk.of(number) for number in range(len(spans))):
            return walk
    return Walk(sampling.steps, _spans_at(sampling, boundary, spans, sampling.steps))


def _spans_at(
    sampling: SamplingSettings, boundary: float | None, spans: Sequence[Span], steps: int
) -> tuple[int | None, ...]:
    found: list[int | None] = []
    for step, expert in enumerate(_experts(sampling, steps, boundary)):
        # The run's step with as much of the walk behind it, or the next one.
        place = math.ceil(step * sampling.steps / steps)
        numbers = [n for n, one in enumerate(spans) if one.begin <= place < one.end and one.expert == expert]
        found.append(numbers[0] if numbers else None)
    return tuple(found)


def _experts(sampling: SamplingSettings, steps: int, boundary: float | None) -> list[int]:
    return experts_of(make_solver(sampling.solver, steps, sampling.shift).timesteps, boundary)
