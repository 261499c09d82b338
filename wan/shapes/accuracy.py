"""Whether a model makes what sentences say: videos of `shapes` sentences, and measurements of what they show."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from wan.files.video import to_frames
from wan.models.wan.pipeline import WanT2V


@torch.no_grad()
def make_videos(pipe: WanT2V, prompts: Sequence[str], seed: int, batch: int) -> Iterator[Tensor]:
    """A uint8 video (frames, H, W, 3) a prompt, as the checkpoint's own settings have it; video n of noise seed + n.

    batch: how many are sampled together
    """
    negative = pipe.encode_text(*pipe.tokenize(pipe.sampling.negative_prompt))
    for first in range(0, len(prompts), batch):
        some = list(prompts[first : first + batch])
        context = pipe.encode_text(*pipe.tokenize(some))
        # Each video's own, so that it does not depend on the batch that it is in.
        noise = torch.cat([pipe.draw_noise(pipe.video, seed + first + n) for n in range(len(some))])
        for latents in pipe.sample(context, negative.expand_as(context), noise=noise):
            yield torch.from_numpy(np.ascontiguousarray(to_frames(pipe.decode(latents))))


def shares(results: Sequence[dict[str, bool]]) -> dict[str, float]:
    """The share of videos that are right, by what about them."""
    return {name: sum(result[name] for result in results) / len(results) for name in results[0]}


@contextlib.contextmanager
def worker_map(workers: int) -> Iterator[Callable[..., Iterable]]:
    """`map` by so many processes, or by this one for 0."""
    if workers == 0:
        yield map
        return
    # A fork of a process with threads may wait for their locks. One thread each, as processes share the cores.
    start = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, start, torch.set_num_threads, (1,)) as pool:

        def each(function: Callable, *columns: Iterable) -> Iterable:
            # Tensors would go through shared memory, of which containers have little.
            arrays = ((x.numpy() if isinstance(x, Tensor) else x for x in column) for column in columns)
            return pool.map(partial(_of_arrays, function), *arrays)

        yield each


def _of_arrays(function: Callable, *values: object) -> object:
    """A function of tensors, called with arrays."""
    return function(*(torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in values))
