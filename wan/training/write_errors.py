"""What runs write, where a disk may fill up: one line for all processes, and none that waits for one that failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.checkpoint import CheckpointException

from nabla import InputError
from wan.files.atomic import written

REMEDY = "free some space, or choose another out, and start again: the last whole state stands"
# In the messages of torch's own writer, whose errors are of no class of their own.
TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "iostream error")
# How libraries that are written in Rust end what they say of an operating system's error.
RUST_ERROR = "(os error "


@contextmanager
def state_write(path: Path) -> Iterator[None]:
    """Turn what torch, safetensors or an operating system raises for a file that cannot be written into one line."""
    with written(path, REMEDY):
        try:
            yield
        # Raised by torch's distributed checkpoints in all processes, with what failed in each of them.
        except CheckpointException as error:
            if (cause := next(filter(None, map(_cannot_be_written, error.failures.values())), None)) is None:
                raise
            raise InputError(f"{path} cannot be written ({cause}); {REMEDY}") from error
        except Exception as error:  # the library of tokenizers has no class of its own
            if isinstance(error, (OSError, InputError)) or (cause := _cannot_be_written((error, None))) is None:
                raise
            raise InputError(f"{path} cannot be written ({cause}); {REMEDY}") from error


def _cannot_be_written(failure: tuple[BaseException, object]) -> str | None:
    """Why a file could not be written, if that is what an error is of, or one that led to it."""
    error: BaseException | None = failure[0]
    is_writing = False
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        is_writing |= type(error) is Exception and RUST_ERROR in str(error)
        is_writing |= isinstance(error, RuntimeError) and any(name in str(error) for name in TORCH_WRITER)
        # Libraries raise errors of their own over an operating system's.
        error = error.__cause__ or error.__context__
    return "the disk may be full" if is_writing else None


@contextmanager
def collective_write(accelerator: Accelerator, path: Path) -> Iterator[None]:
    """What some of the processes write to a path: if one of them cannot, all raise its `InputError`."""
    failure = None
    try:
        with state_write(path):
            yield
    except InputError as error:
        failure = error
    # An exchange: a process that wrote well, or nothing, has to come by here too.
    said = gather_object([None if failure is None else str(failure)])
    if why := next(filter(None, said), None):
        raise InputError(why) from failure
