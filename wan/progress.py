"""One line that says where a generation is: stage, step, time left, and the share of blocks that is kept."""

from __future__ import annotations

from tqdm import tqdm

LINE = "{desc:<8} |{bar:24}| step {n_fmt} of {total_fmt}{postfix}"
TIMED_LINE = "{desc:<8} |{bar:24}| step {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}"


class Progress:
    """The line, on stderr; `close` leaves it there."""

    def __init__(self, steps: int):
        self.bar = tqdm(total=steps, desc="start", unit="step", bar_format=LINE, dynamic_ncols=True)

    def stage(self, name: str) -> None:
        self.bar.bar_format = LINE
        if name == "sampling":
            # Else the text encoder's time would count as a step's.
            self.bar.reset()
            self.bar.bar_format = TIMED_LINE
        self.bar.set_description_str(name)

    def step(self, kept: float | None) -> None:
        """A step is done, of which layers kept such a share of the blocks."""
        if kept is not None:
            self.bar.set_postfix_str(f"kept {kept:.1%}", refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
