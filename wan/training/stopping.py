"""How a run ends: its last step done, diverged, or asked by SIGTERM between two steps."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from typing import Any

from accelerate import Accelerator

# Set for the programs that `accelerate launch` starts.
LAUNCHED = "ACCELERATE_DYNAMO_BACKEND"
PR_SET_PDEATHSIG = 1


class Diverged(RuntimeError):
    """A loss or a gradient that is not finite; the message says where. No checkpoint was written of it."""


class Stopped(Exception):
    """The run was asked to end by SIGTERM, and did so after a step and a checkpoint."""


class StopSignal:
    """While it is entered, SIGTERM sets `asked` and does nothing else."""

    def __init__(self) -> None:
        self.asked = False
        self.before: Any = None

    def __enter__(self) -> None:
        self.before = signal.signal(signal.SIGTERM, self._ask)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def _ask(self, *_: object) -> None:
        self.asked = True


def let_go(accelerator: Accelerator) -> None:
    """Free models that nothing else holds, in each process, before the group of processes ends.

    DDP's reducer, freed after it, may wait for ever with Python's lock held for a thread of gloo that wants the lock.
    """
    accelerator.free_memory()
    gc.collect()


def stop_with_launcher() -> None:
    """Have SIGTERM sent to this process when its launcher ends: that of one process passes on none that it gets.

    Linux alone can. Started from a shell, a run may outlive that.
    """
    if sys.platform == "linux" and LAUNCHED in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
