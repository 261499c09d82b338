"""Under torchrun: generate.py with a fault on one process. Arguments: the fault, the process, generate.py's own."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time

import generate
from wan.checkpoints import tensor_files
from wan.files import video
from wan.run import inputs
from wan.sampling import guided


def killed_in_sampling() -> None:
    def end(step: int) -> None:
        # The other one waits for this one's prediction by then: what it says is said at once, before torchrun ends it.
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)

    def denoise(*args, **kwargs):
        return original(*args, **kwargs | {"before_step": end})

    original, guided.denoise = guided.denoise, denoise


def slow_sampling() -> None:
    def denoise(*args, **kwargs):
        print("sampling begins", file=sys.stderr, flush=True)
        time.sleep(60)

    guided.denoise = denoise


def unreadable_shard() -> None:
    def safe_open(*args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    tensor_files.safe_open = safe_open


def full_disk() -> None:
    def file_hash(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    video.file_hash = file_hash


def picture_gone() -> None:
    def gone(path, *args, **kwargs):
        return original(f"{path}.gone", *args, **kwargs)

    original, inputs.read_picture = inputs.read_picture, gone


def broken_code() -> None:
    def denoise(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    guided.denoise = denoise


if __name__ == "__main__":
    fault, rank, *flags = sys.argv[1:]
    if rank in (os.environ["RANK"], "all"):
        globals()[fault]()
    sys.exit(generate.main(flags))
