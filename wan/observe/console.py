"""What a program says on stderr, and how it ends: by its own end, an input to mend, Ctrl-C or a signal.

Imports nothing heavy, so that a program can guard the seconds in which torch is imported too.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

INTERRUPTED = 130
# Those that a batch system, a container or a closed terminal ends a program by. Windows has no SIGHUP.
ENDING_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class EndedBySignal(BaseException):
    """A signal asks the program to end: like `KeyboardInterrupt` it passes all that cleans up on its way out."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def printable(text: object) -> str:
    """Text of one line that no terminal obeys: control characters, line breaks and lone surrogates are escaped.

    As `nabla.config` has it too, from where it would import torch.
    """
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in str(text))


def say(text: str) -> None:
    """A line on stderr; lost if that cannot be written, see `ForgivingStream`."""
    # Without a stderr, print would take stdout.
    if sys.stderr is not None:
        print(printable(text), file=ForgivingStream(sys.stderr), flush=True)


class ForgivingStream:
    """A stream of the program that is given no error: whoever read it may have gone, or its disk be full.

    A run that took hours must not die of its messages, whichever library writes them. lost: why some were not written
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self.lost: Exception | None = None

    def write(self, text: str) -> int:
        with self._forgiving():
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        with self._forgiving():
            self._stream.flush()

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            # A ValueError is of a stream that has been closed.
            self.lost = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class StderrHandler(logging.Handler):
    """Log records as single lines on stderr, whatever it is at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def positive(text: str) -> int:
    """The type of a flag that counts something there must be one of."""
    # int() alone would take signs, underscores, spaces and digits of any script.
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a positive whole number")
    return int(text)


def log_to_stderr() -> None:
    """Have the program's own log, and warnings of libraries, written to stderr."""
    # force: handlers that libraries put on the root logger go, which would say things twice.
    logging.basicConfig(format="%(message)s", handlers=[StderrHandler()], force=True)
    logging.getLogger("wan").setLevel(logging.INFO)


def run_program(
    main: Callable[..., int | None], *args: Any, interrupted: str = "interrupted; no half-written file is left"
) -> int:
    """Run a program's main function and give its exit code; bugs keep their tracebacks.

    1 for a result on stdout that could not be written, unless its reader has gone, who wants no more of it; 2 for an
    input to mend, after a line that says how; 130 for Ctrl-C, and 128 and its number for a signal, once all
    that is half-written is removed. main: raises `InputError` for inputs, which is imported only when needed
    """
    _fill_closed()
    before = {number: signal.signal(number, _end) for number in ENDING_SIGNALS if _is_ours(number)}
    streams = sys.stdout, sys.stderr
    # Python has None for a stream that was closed when it started, which libraries would fail to write to.
    sys.stdout, sys.stderr = (ForgivingStream(one or open(os.devnull, "w")) for one in streams)
    try:
        return main(*args) or _unwritten_result()
    except KeyboardInterrupt:
        say(interrupted)
        return INTERRUPTED
    except EndedBySignal as end:
        say(interrupted.replace("interrupted", f"ended by {signal.Signals(end.number).name}", 1))
        return 128 + end.number
    except ValueError as error:
        from nabla import InputError

        if not isinstance(error, InputError):
            raise
        say(f"error: {error}")
        return 2
    finally:
        sys.stdout, sys.stderr = streams
        for number, handler in before.items():
            signal.signal(number, handler)


def _unwritten_result() -> int:
    """1, after a line, if what was printed is lost."""
    sys.stdout.flush()
    why = sys.stdout.lost if isinstance(sys.stdout, ForgivingStream) else None
    if why is None or isinstance(why, BrokenPipeError):
        return 0
    say(f"error: what was printed could not be written ({getattr(why, 'strerror', None) or why}); free some space")
    return 1


def _fill_closed() -> None:
    """Have something behind stdin, stdout and stderr: else the next file opened would get their messages."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken, which is this one: those below it are open by now.
            os.open(os.devnull, os.O_RDWR)


def _end(number: int, _: object) -> NoReturn:
    # A second one while the first is cleaned up after would leave what it removes.
    signal.signal(number, signal.SIG_IGN)
    raise EndedBySignal(number)


def _is_ours(number: int) -> bool:
    """Whether a signal would end the program now: nohup has it ignored, a test or a trainer handles it itself."""
    return signal.getsignal(number) == signal.SIG_DFL


def exit_with(code: int) -> NoReturn:
    """End the program, without a complaint of Python about a stdout or stderr that is gone."""
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            # Flushed once more while Python ends, and lost there.
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    sys.exit(code)
