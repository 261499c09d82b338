"""Items of datasets, read by worker processes that end with the run and not before."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from wan.observe.console import ENDING_SIGNALS


def load_items(
    dataset: Dataset, numbers: Iterable[int], workers: int, context: str | None = None
) -> Generator[Any, None, None]:
    """The items of these numbers, in order, arrays as tensors, pinned if there is a GPU. To be closed if left before.

    context: how workers start, see `multiprocessing.get_context`
    """
    try:
        # By `yield from`, so that closing ends the workers at once: at exit Python would wait for them.
        yield from DataLoader(
            dataset,
            # Items are whole batches already.
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=context if workers else None,
            worker_init_fn=_leave_signal_to_parent,
        )
    except Exception as error:
        if workers:
            # The message has the worker's own; this one would hold the workers, so that the program never ended.
            error.__traceback__ = None
        raise


def _leave_signal_to_parent(_: int) -> None:
    """Such signals often go to all processes of a run, whose last step still needs its data."""
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
