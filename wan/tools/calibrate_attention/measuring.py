"""Measuring what is not on the file of measurements yet: costs, layers' errors, and those of whole profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from torch import Tensor
from tqdm import tqdm

from wan.tools.calibrate_attention.bench import Bench, progress
from wan.tools.calibrate_attention.cost import Cost, Meter
from wan.tools.calibrate_attention.design import Design, layer_milliseconds
from wan.tools.calibrate_attention.records import CHECK, COST, LAYER, VIDEO, Forward, Record, Records, forward_of
from wan.tools.calibrate_attention.sensitivity import LayerErrors, Rerun, measure_layers, relative_square

# What each layer keeps, by stretch.
Keeps = Sequence[Sequence[float]]


def measure_cost(bench: Bench, records: Records, mode: str, exact_seconds: float) -> None:
    """Time a forward, and choose by that how all others are measured: `exact`, `fast`, or `auto` for either."""
    if records.one(COST) is not None:
        return
    measured: list[Cost] = []

    def look(step: int, branch: int, forward: Rerun) -> Tensor:
        if not measured:
            measured.append(Meter(bench.running, bench.design.shares, bench.pipe.device).measure(forward))
        return forward()

    walker = bench.walk(0, look, last=0)
    cost = replace(measured[0], calls=walker.calls[0])
    exact = mode == "exact" or (mode == "auto" and bench.design.seconds(cost, True) <= exact_seconds)
    records.add(COST, **cost.to_record(), exact=exact)


class Missing:
    """What is not measured yet.

    wanted: of all forwards the shares at which the error of the velocity is measured
    layers: of each forward those that are missing, none of those without; stages: whether a video's stages before and
        behind its steps are
    """

    def __init__(self, design: Design, records: Records):
        self.design, self.records = design, records
        self.cost, exact = cost_of(records)
        self.dense = self.cost.forward([1.0] * self.cost.layers)
        self.wanted = design.forwards(self.cost.calls, exact)
        self.stages = records.one(VIDEO) is None
        self.layers: dict[Forward, list[int]] = {}
        for one in self.wanted:
            there = records.layers_of(one)
            if left := [layer for layer in range(self.cost.layers) if layer not in there]:
                self.layers[one] = left

    def __bool__(self) -> bool:
        return bool(self.layers) or self.stages

    def measure(self, bench: Bench) -> None:
        """All of it."""
        with progress("measuring", self._work) as bar:
            for prompt in range(self.design.prompts):
                self._measure_prompt(bench, prompt, bar)

    @property
    def _work(self) -> float:
        """Milliseconds, about, with the walks that lead there."""
        walks = sum(self._last(prompt) + 1 for prompt in range(self.design.prompts))
        layers = sum(self._times(one)[layer] for one, left in self.layers.items() for layer in left)
        return walks * self.cost.calls * self.dense + layers

    def _measure_prompt(self, bench: Bench, prompt: int, bar: tqdm) -> None:
        last, decodes = self._last(prompt), prompt == 0 and self.stages
        if last < 0 and not decodes:
            return

        def look(step: int, branch: int, forward: Rerun) -> Tensor:
            velocity = self._look(bench, Forward(prompt, step, branch), forward, bar)
            bar.update(self.dense if step <= last else 0)
            return velocity

        walker = bench.walk(prompt, look, last, decodes)
        if decodes:
            self.records.add(VIDEO, text=walker.seconds["text"], decode=walker.seconds["decode"])

    def _look(self, bench: Bench, this: Forward, forward: Rerun, bar: tqdm) -> Tensor:
        if this not in self.layers:
            return forward()
        times = self._times(this)

        def found(errors: LayerErrors) -> None:
            self.records.add(LAYER, **this._asdict(), **asdict(errors))
            bar.update(times[errors.layer])

        layers, whole, shares = self.layers[this], self.wanted[this], self.design.shares
        return measure_layers(bench.running, shares, forward, layers, whole, self.cost.nbytes, found)

    def _times(self, forward: Forward) -> list[float]:
        return list(layer_milliseconds(self.cost, self.design.shares, self.wanted[forward]))

    def _last(self, prompt: int) -> int:
        """The last of a prompt's steps of which something is missing; -1 where nothing is."""
        return max((one.step for one in self.layers if one.prompt == prompt), default=-1)


class Unchecked:
    """What is not checked yet of profiles, by names that say what is in them.

    names: of each forward of the prompts that no layer was measured on
    """

    def __init__(self, design: Design, records: Records, keeps: Mapping[str, Keeps]):
        self.design, self.records, self.keeps = design, records, keeps
        self.calls = cost_of(records)[0].calls
        there = {(line["name"], forward_of(line)) for line in records.of(CHECK)}
        self.names: dict[Forward, list[str]] = {}
        for one in design.checked_forwards(self.calls):
            if left := [name for name in keeps if (name, one) not in there]:
                self.names[one] = left

    def __bool__(self) -> bool:
        return bool(self.names)

    def measure(self, bench: Bench) -> None:
        """All of it."""
        prompts = sorted({one.prompt for one in self.names})
        with progress("checking", len(prompts) * self.design.walk.steps * self.calls) as bar:
            for prompt in prompts:

                def look(step: int, branch: int, forward: Rerun) -> Tensor:
                    bar.update(1)
                    return self._look(bench, Forward(prompt, step, branch), forward)

                bench.walk(prompt, look, max(one.step for one in self.names if one.prompt == prompt))

    def _look(self, bench: Bench, this: Forward, forward: Rerun) -> Tensor:
        exact = forward()
        for name in self.names.get(this, ()):
            with bench.running.keeping(self.keeps[name][self.design.span_at(this.step)]):
                error = relative_square(forward(), exact).item()
            self.records.add(CHECK, name=name, **this._asdict(), error=error)
        return exact


def cost_of(records: Records) -> tuple[Cost, bool]:
    """What was timed, which has to be there, and whether all is measured exactly."""
    record: Record | None = records.one(COST)
    assert record is not None, "costs are measured first"
    return Cost.of_record(record), record["exact"]
