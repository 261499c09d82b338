"""One line that says where a generation is: stage, step, time left, and the share of blocks that is kept."""

from __future__ import annotations

import statistics
from collections import deque

from tqdm import tqdm

LINE = "{desc:<8} |{bar:24}| step {n_fmt} of {total_fmt}{postfix}"
# The steps that tell how long those to come take: dense ones take longer, those that a cache leaves out less.
RECENT = 6


class Pace:
    """How long steps to come will take, by the last ones."""

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=RECENT)

    def seconds_left(self, seconds: float, steps: int) -> float:
        """For so many steps, after one that took `seconds`."""
        self.recent.append(seconds)
        return steps * statistics.mean(self.recent)


class ProgressLine:
    """The line, on stderr; `close` leaves it there."""

    def __init__(self, steps: int):
        self.bar = tqdm(total=steps, desc="start", bar_format=LINE, dynamic_ncols=True)
        self.kept = ""
        self.pace = Pace()

    def stage(self, name: str) -> None:
        self.bar.set_postfix_str(self.kept, refresh=False)
        self.bar.set_description_str(name)

    def step(self, seconds: float, kept: float | None) -> None:
        """A step is done, which took so long, and of which layers kept such a share of the blocks.

        Not by the clock: of a GPU a step is known to be done when part of the next one is.
        """
        if kept is not None:
            self.kept = f"kept {kept:.1%}"
        if self.bar.n == 1:
            # The first compiled.
            self.pace = Pace()
        # This step is counted only below.
        left = tqdm.format_interval(self.pace.seconds_left(seconds, self.bar.total - self.bar.n - 1))
        said = f"{seconds:.2f} s a step", f"{left} left", self.kept
        self.bar.set_postfix_str(", ".join(filter(None, said)), refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
