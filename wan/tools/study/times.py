"""Milliseconds of a layer's attention on a large model, from what scripts/benchmark.py printed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nabla import InputError, NablaConfig
from wan.tools.study.rules import RULES
from wan.tools.study.settings import DENSE, Setting

# Of the 14B, one of which runs dense where layer 0 does.
LAYERS = 40
# A row of mode `attention`: a whole layer's attention, its lists within.
WHOLE = re.compile(r"attend by \w+, (?P<config>.+)")
KERNEL = re.compile(r"(cudnn|flex), (?P<config>.+)")
DENSE_ROW = re.compile(r"dense, ")


class Times:
    """whole: milliseconds of a layer by its attention's `algorithm`, lists within; kernel: without them
    dense: of the fastest dense kernel, or None
    """

    def __init__(self, whole: Mapping[str, float], kernel: Mapping[str, float], dense: float | None):
        self.whole, self.kernel, self.dense = dict(whole), dict(kernel), dense

    @classmethod
    def read(cls, paths: Iterable[Path]) -> Times:
        """Of outputs of `scripts/benchmark.py attention`, of one size; of equal rows the fastest counts."""
        found: dict[str, dict[str, float]] = {"whole": {}, "kernel": {}, "dense": {}}
        for path in paths:
            for row in _rows(path):
                what = row["what"].split(": ", 1)[-1]
                for kind, pattern in (("whole", WHOLE), ("kernel", KERNEL), ("dense", DENSE_ROW)):
                    if match := pattern.match(what):
                        name = DENSE if kind == "dense" else _algorithm(match["config"])
                        found[kind][name] = min(row["ms"], found[kind].get(name, row["ms"]))
        return cls(found["whole"], found["kernel"], found["dense"].get(DENSE))

    def of(self, setting: Setting) -> float | None:
        """The mean over the layers and steps of a video, or None where something of it was not measured."""
        sparse = self._sparse(setting)
        if self.dense is None or sparse is None:
            return None
        layer = (self.dense + (LAYERS - 1) * sparse) / LAYERS if setting.layer_0 else sparse
        return setting.dense_steps * self.dense + (1 - setting.dense_steps) * layer

    def to_record(self) -> dict[str, Any]:
        return {"whole": self.whole, "kernel": self.kernel, "dense": self.dense}

    def _sparse(self, setting: Setting) -> float | None:
        if setting.rule == DENSE:
            return self.dense
        rule = RULES.get(setting.rule)
        if rule is None:
            return None
        # What nabla has itself; windows are listed once for all steps, so that their kernel alone is run.
        if rule.build is None:
            return self.whole.get(setting.config(LAYERS).algorithm)
        fixed = setting.rule in ("radial", "sta_long", "sta_cube", "random")
        return self.kernel.get(NablaConfig(keep=setting.share).algorithm) if fixed else None


def _algorithm(text: str) -> str:
    """That of a row's words, such as `keep 0.1` or `keep-0.1_pool-1-4-4`."""
    try:
        return NablaConfig.parse(text.replace("keep ", "keep-")).algorithm
    except InputError:
        return text


def _rows(path: Path) -> list[dict[str, Any]]:
    """A table for people comes before the line of JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])["rows"]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"times {path} are not what scripts/benchmark.py attention printed ({error})") from None
