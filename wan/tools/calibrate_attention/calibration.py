"""A calibration: measuring what is missing, solving for a profile, checking it, and writing it down."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from wan.files.hashes import text_hash
from wan.tools.calibrate_attention.bench import Bench
from wan.tools.calibrate_attention.cost import Cost
from wan.tools.calibrate_attention.design import EXACT_SECONDS, Design
from wan.tools.calibrate_attention.job import Job
from wan.tools.calibrate_attention.measuring import Missing, Unchecked, cost_of, measure_cost
from wan.tools.calibrate_attention.profile_file import profile_of, write_profile
from wan.tools.calibrate_attention.records import CHECK, COST, LAYER, VIDEO, Record, Records
from wan.tools.calibrate_attention.table import Keep, solve_keep, table_of
from wan.tools.calibrate_attention.timing import VideoTime, video_time

log = logging.getLogger("wan")


class Solved(NamedTuple):
    """keep, uniform: the shares of a profile, and one share for all at the same cost, by stretch and layer
    about: what is predicted of both and measured of them on other prompts
    """

    keep: list[Keep]
    uniform: list[Keep]
    time: VideoTime
    about: dict[str, Any]


class Calibration:
    """A job and its file of measurements; models are loaded when something has to be measured."""

    def __init__(self, job: Job, measurements: Path):
        self.job, self.design = job, job.design
        self.records = Records(measurements, job.settings)
        self._bench: Bench | None = None

    @property
    def bench(self) -> Bench:
        if self._bench is None:
            self._bench = self.job.open_bench()
        return self._bench

    def measure(self) -> None:
        """All that is not measured yet."""
        if self.records.one(COST) is None:
            measure_cost(self.bench, self.records, self.job.mode, EXACT_SECONDS)
        cost, exact = cost_of(self.records)
        for line in about_cost(cost, self.design, exact):
            log.info("%s", line)
        if missing := Missing(self.design, self.records):
            missing.measure(self.bench)

    def solve(self, keep: float | None, seconds: float | None) -> Solved:
        """The profile with the least error within a budget, one of the two, and what it is worth."""
        time = self._time()
        if seconds is None:
            assert keep is not None, "there is one budget"
            found, share = solve_keep(time.table, keep), keep
        else:
            found, share = time.solve(seconds), time.uniform_share(seconds)
        uniform = time.table.uniform(share)
        if unchecked := Unchecked(self.design, self.records, {name_of(one): one for one in (found, uniform)}):
            unchecked.measure(self.bench)
        kinds = {"profile": found, "uniform": uniform}
        return Solved(found, uniform, time, {kind: self._about(time, one) for kind, one in kinds.items()})

    def write(self, solved: Solved, out: Path, plot: Path | None) -> None:
        """The profile's file, and the picture where one is wished."""
        first, on = self.job.first, self.job.measured_on
        about = on | {"layers": len(solved.keep[0]), "found": solved.about}
        write_profile(out, profile_of(self.design.spans, solved.keep, first.sampling.steps, first.attention, about))
        if plot is not None:
            # Imported here, since matplotlib is an optional requirement.
            from wan.tools.calibrate_attention.figure import draw

            kept = f"{solved.time.table.mean_keep(solved.keep):.1%} of blocks in the mean"
            title = f"{on['checkpoint']}, {kept}, {'x'.join(map(str, on['grid']))} tokens, {on['card']}"
            draw(plot, title, solved.time, solved.keep)

    def _time(self) -> VideoTime:
        stages = self.records.one(VIDEO)
        assert stages is not None, "a video's stages are measured with the layers"
        design, job = self.design, self.job
        table = table_of(self.records.of(LAYER), design.spans, design.walk, design.shares)
        scales = job.first.sampling.guide_scales
        return video_time(table, cost_of(self.records)[0], stages, job.dense_steps, scales)

    def _about(self, time: VideoTime, keep: Sequence[Keep]) -> dict[str, float]:
        """The mean share, predicted error and seconds, and the error on prompts that nothing was measured on."""
        about = {
            "keep": round(time.table.mean_keep(keep), 4),
            "seconds": round(time.seconds(keep), 2),
            "predicted_error": _rounded(time.table.predicted(keep)),
        }
        lines = [line for line in self.records.of(CHECK) if line["name"] == name_of(keep)]
        return about | ({"checked_error": _rounded(_error(lines, self.design))} if lines else {})


def name_of(keep: Sequence[Keep]) -> str:
    """A name that belongs to what a profile keeps."""
    return text_hash(repr([list(shares) for shares in keep]))[:12]


def about_cost(cost: Cost, design: Design, exact: bool) -> Iterator[str]:
    """Lines of what shares save here, those first that save nothing, and of how long measuring takes."""
    saved = ", ".join(f"{share:g} {cost.saved(share):.0%}" for share in cost.shares)
    dense = "/".join(f"{ms:.3g}" for ms in cost.dense)
    yield f"time: a block takes {dense} ms dense; by share of its blocks it is shorter by {saved}"
    for share in cost.shares:
        if cost.saved(share) <= 0:
            yield f"warning: a share of {share:g} takes no less time than dense attention here; it only loses"
    how = "exactly" if exact else "by gains (fast)"
    seconds = {kind: design.seconds(cost, kind == "exact") for kind in ("exact", "fast")}
    yield (
        f"measuring {design.prompts} prompts in {len(design.walk.measured)} of {design.walk.steps} steps {how}: about "
        f"{_minutes(seconds['exact' if exact else 'fast'])} from nothing (exact {_minutes(seconds['exact'])}, "
        f"fast {_minutes(seconds['fast'])})"
    )


def about_solved(solved: Solved) -> Iterator[str]:
    """A table for people."""
    yield f"{'':<10}{'keep':>8}{'seconds':>10}{'error predicted':>18}{'on other prompts':>18}"
    for kind, about in solved.about.items():
        checked = about.get("checked_error")
        cells = f"{about['keep']:>8.1%}{about['seconds']:>10.1f}{about['predicted_error']:>18.4g}"
        yield f"{kind:<10}{cells}{'-' if checked is None else f'{checked:.4g}':>18}"
    for span, shares in zip(solved.time.table.spans, solved.keep):
        kept = " ".join(f"{share:g}" for share in shares)
        yield f"steps {span.begin} to {span.end - 1}: {kept}"


def _error(lines: Sequence[Record], design: Design) -> float:
    """The mean relative error of checks, in which each stretch counts by its steps."""
    total = 0.0
    for number, span in enumerate(design.spans):
        errors = [math.sqrt(line["error"]) for line in lines if design.span_at(line["step"]) == number]
        total += span.steps * statistics.fmean(errors)
    return total / sum(span.steps for span in design.spans)


def _rounded(error: float) -> float:
    return float(f"{error:.4g}")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
