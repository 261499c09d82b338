"""How a run ends: its last step done, diverged, or asked by a signal between two steps."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from typing import Any

from accelerate import Accelerator

from wan.observe.console import ENDING_SIGNALS, say

# Set for the programs that `accelerate launch` starts.
LAUNCHED = "ACCELERATE_DYNAMO_BACKEND"
# Of linux/prctl.h.
PR_SET_PDEATHSIG = 1


class Diverged(RuntimeError):
    """A loss or a gradient that is not finite; the message says where. No checkpoint was written of it."""

    exit_code = 1


class Stopped(Exception):
    """The run was asked to end by SIGTERM or SIGHUP, and did so after a step and a checkpoint."""

    # As shells report a process that SIGTERM has ended.
    exit_code = 128 + signal.SIGTERM


def report_end(end: Diverged | Stopped) -> int:
    """A program's exit code for a run that ended so, which is told on stderr."""
    say(f"error: {end}" if isinstance(end, Diverged) else str(end))
    return end.exit_code


class StopSignal:
    """While it is entered, SIGTERM sets `asked` and does nothing else; SIGHUP too, unless it is ignored as by nohup."""

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in ENDING_SIGNALS:
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                # Python calls handlers between any two operations, so this one leaves a note for the loop to read.
                self.before[number] = signal.signal(number, self._ask)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self.asked = True


def release_accelerator(accelerator: Accelerator) -> None:
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
