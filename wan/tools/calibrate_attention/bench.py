"""A pipeline on which layers are measured: its videos, and walks of them whose forwards are looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn
from tqdm import tqdm

from wan.config.settings import Settings
from wan.sampling.guided import GuidedPipeline
from wan.tools.calibrate_attention.design import Design
from wan.tools.calibrate_attention.seats import Seats
from wan.tools.calibrate_attention.walking import Look, Walker

LINE = "{desc} |{bar:24}| {percentage:.0f}%, {elapsed} so far, {remaining} left{postfix}"


class Bench:
    """every: settings of the videos, in the order of the prompts

    The pipeline's attention has to keep a share of blocks in all layers.
    """

    def __init__(self, pipe: GuidedPipeline, every: Sequence[Settings], design: Design):
        self.pipe, self.every, self.design = pipe, every, design
        self.seats = [Seats(one, pipe.transformer_spec) for one in pipe.transformers]

    @property
    def running(self) -> Seats:
        """Those of the transformer that runs now."""
        running: nn.Module = self.pipe.running
        return next(one for one in self.seats if one.transformer is running)

    def walk(self, prompt: int, look: Look, last: int, decodes: bool = False) -> Walker:
        """Walk a prompt's video, see `Walker`."""
        walker = Walker(self.pipe, look, last, decodes)
        with ExitStack() as stack:
            for one in self.seats:
                stack.enter_context(one.taken())
            walker.walk(self.every[prompt], self.design.walk.steps)
        return walker


@contextmanager
def progress(what: str, work: float) -> Iterator[tqdm]:
    """A line that says how much of some work is done, and how long the rest will take."""
    with tqdm(total=max(work, 1e-9), desc=what, bar_format=LINE, dynamic_ncols=True) as bar:
        yield bar
