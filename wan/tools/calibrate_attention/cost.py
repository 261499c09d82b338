"""What a forward costs on this card: a block at each share, and all that is outside of blocks."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wan.tools.benchmark.timing import synchronize, timed
from wan.tools.calibrate_attention.seats import Role, Seats
from wan.tools.calibrate_attention.sensitivity import Rerun

REPEATS = 5


@dataclass(frozen=True)
class Cost:
    """Milliseconds of one forward's parts.

    lists: how many blocks each list of the transformer has; dense: of a block of each list
    sparse: the same by share; outside: of all that is not in blocks
    nbytes: of a block's output; calls: forwards of a step
    """

    lists: tuple[int, ...]
    dense: tuple[float, ...]
    sparse: Mapping[float, tuple[float, ...]]
    outside: float
    nbytes: int
    calls: int = 1

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Cost:
        """Of what `to_record` gave, as JSON has it."""
        sparse = {float(share): tuple(ms) for share, ms in record["sparse"].items()}
        lists, dense = tuple(record["lists"]), tuple(record["dense"])
        return cls(lists, dense, sparse, record["outside"], record["nbytes"], record["calls"])

    def to_record(self) -> dict[str, Any]:
        return asdict(self) | {"sparse": {str(share): list(ms) for share, ms in self.sparse.items()}}

    @property
    def layers(self) -> int:
        return sum(self.lists)

    @property
    def shares(self) -> list[float]:
        return sorted(self.sparse)

    def block(self, layer: int, share: float) -> float:
        """Of a layer's block at a share, of those measured or in a line between them; 1 is dense."""
        place = self._list_of(layer)
        known = [(one, self.sparse[one][place]) for one in self.shares] + [(1.0, self.dense[place])]
        if share <= known[0][0]:
            return known[0][1]
        for (low, before), (high, after) in zip(known, known[1:]):
            if share <= high:
                return before + (after - before) * (share - low) / (high - low)
        raise ValueError(f"share {share} is above 1")

    def forward(self, keep: Sequence[float]) -> float:
        """Of a whole forward whose layers keep these shares."""
        return self.outside + sum(self.block(layer, share) for layer, share in enumerate(keep))

    def saved(self, share: float) -> float:
        """By what part a block is shorter at a share than dense, in the mean over layers; below zero: it is longer."""
        return 1 - sum(n * ms for n, ms in zip(self.lists, self.sparse[share])) / self._all_dense

    @property
    def _all_dense(self) -> float:
        return sum(n * ms for n, ms in zip(self.lists, self.dense))

    def _list_of(self, layer: int) -> int:
        place = 0
        while layer >= self.lists[place]:
            layer -= self.lists[place]
            place += 1
        return place


class Meter:
    """Times the first forward that it is given, once it is warm."""

    def __init__(self, seats: Seats, shares: Sequence[float], device: torch.device):
        self.seats, self.shares = seats, shares
        self.args = argparse.Namespace(device=str(device), repeats=REPEATS)
        self.lists = tuple(len(getattr(seats.transformer, one.name)) for one in seats.spec.blocks)
        self.times: dict[int, list[float]] = {}
        self.nbytes = 0

    @torch.no_grad()
    def measure(self, forward: Rerun) -> Cost:
        """The cost of forwards like this one."""
        ends = [sum(self.lists[: n + 1]) for n in range(len(self.lists))]
        # One in the middle of each list, for all are alike.
        middles = [end - (size + 1) // 2 for end, size in zip(ends, self.lists)]
        with self.seats.roles({layer: self._timing(layer) for layer in middles}):
            forward()
        synchronize(self.args)
        start = time.perf_counter()
        forward()
        synchronize(self.args)
        whole = 1000 * (time.perf_counter() - start)
        dense, *sparse = zip(*(self.times[layer] for layer in middles))
        outside = max(0.0, whole - sum(n * ms for n, ms in zip(self.lists, dense)))
        return Cost(self.lists, dense, dict(zip(self.shares, sparse)), outside, self.nbytes)

    def _timing(self, layer: int) -> Role:
        def run(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            times = []
            for share in (1.0, *self.shares):
                self.seats.set(layer, share)
                times.append(timed("", lambda: block(*args, **kwargs), self.args)["ms"])
            self.seats.set(layer, 1.0)
            self.times[layer] = times
            output = block(*args, **kwargs)
            self.nbytes = sum(one.nbytes for one in _tensors(output))
            return output

        return run


def _tensors(output: Any) -> Sequence[Tensor]:
    return output if isinstance(output, tuple) else (output,)
