"""What ties the processes of a run together."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

# Others wait while the first process converts or writes whole checkpoints.
PATIENCE = timedelta(hours=2)


def build_accelerator() -> Accelerator:
    """An accelerator for all processes of a run, on GPUs where there are any."""
    return Accelerator(
        # Mixed precision is autocast around forwards alone, so that weights, and what FSDP sends, stay float32.
        mixed_precision="no",
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENCE),
            # DDP sends gradients from where they are, rather than from a copy.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
