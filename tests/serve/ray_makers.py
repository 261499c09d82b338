"""What tests of Ray have its processes make videos by: our `Maker`, which keeps the latents that it decodes."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

import torch

from wan.parallel.distributed import DistributedContext
from wan.run.generation import load_pipeline
from wan.run.request import Options
from wan.sampling.guided import GuidedPipeline
from wan.serve.workers.maker import Maker


def make_maker(checkpoint: Path, folder: Path, processes: DistributedContext | None = None) -> Maker:
    """The latents of each video that a process has made are in the folder, see `latents_of`.

    Forwards take longer than they would, and leave the cores to processes that start meanwhile.
    """
    numbers = itertools.count()

    def load(*what: Any) -> GuidedPipeline:
        pipe = load_pipeline(*what)
        decode, predict = pipe.decode, pipe.predict

        def keep(latents: torch.Tensor) -> torch.Tensor:
            torch.save(latents, latents_of(folder, os.getpid(), next(numbers)))
            return decode(latents)

        def wait(*what: Any) -> torch.Tensor:
            time.sleep(0.2)
            return predict(*what)

        pipe.decode, pipe.predict = keep, wait
        return pipe

    return Maker(Options(device="cpu"), str(checkpoint), load, processes)


def latents_of(folder: Path, process: int, number: int) -> Path:
    """Where those of a process's video are, by the number of the process and that of the video, from 0."""
    return folder / f"latents-{process}-{number}.pt"
