"""A replica that is one process of this machine."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Protocol

from nabla import InputError
from wan.observe.console import log_to_stderr
from wan.serve.workers.messages import EVENTS_AT_THE_END, Aborted, Event, Failed, Made, Order, Progress
from wan.serve.workers.replica import ReplicaDied

READY, ABORT = "ready", "abort"
# The server decides when its processes end, also where a terminal or a service manager tells all of them to.
SIGNALS_OF_THE_SERVER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What a process that has let go of its pipe may take to be gone.
GRACE_SECONDS = 5.0


class MakesVideos(Protocol):
    """What a process makes videos by: `wan.serve.workers.maker.Maker`."""

    def make(
        self, order: Order, tell: Callable[[Progress], None], is_aborted: Callable[[], bool]
    ) -> Made | Failed | Aborted | None: ...


class ProcessReplica:
    """A `Replica` of one process, which ends with this one, however that ends.

    make_maker: makes in that process what makes its videos; has to be of a kind that pickle takes
    Raises `ReplicaDied` if the process does not come up, and `InputError` for what `make_maker` finds wrong.
    """

    def __init__(self, make_maker: Callable[[], MakesVideos]):
        # A fork would take over this process's threads' locks, and could not use CUDA.
        context = multiprocessing.get_context("spawn")
        self.connection, far_end = context.Pipe()
        self.process = context.Process(target=work, args=(far_end, make_maker), name="video worker", daemon=True)
        self.process.start()
        far_end.close()
        # Before multiprocessing waits for its processes, of which this one heeds no signal.
        atexit.register(self.close)
        said = self._receive()
        if isinstance(said, Failed):
            self.close()
            raise InputError(said.message)

    def start(self, order: Order) -> None:
        try:
            self.connection.send(order)
        except OSError:
            raise self._died() from None

    def poll(self, seconds: float) -> Event | None:
        return self._receive() if self.connection.poll(seconds) else None

    def abort(self) -> None:
        # Of a process that has gone `poll` tells.
        with suppress(OSError):
            self.connection.send(ABORT)

    def close(self) -> None:
        atexit.unregister(self.close)
        self.process.kill()
        self.process.join()
        self.connection.close()

    def _receive(self) -> Event:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            raise self._died() from None

    def _died(self) -> ReplicaDied:
        self.process.join(GRACE_SECONDS)
        code = self.process.exitcode
        if code is not None and code < 0:
            return ReplicaDied(f"its process was ended by {signal.Signals(-code).name}")
        return ReplicaDied("its process has let go of its pipe" if code is None else f"its process ended with {code}")


def work(connection: Connection, make_maker: Callable[[], MakesVideos]) -> None:
    """What the process of a replica does, until it is ended."""
    for number in SIGNALS_OF_THE_SERVER:
        signal.signal(number, signal.SIG_IGN)
    log_to_stderr()
    orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
    aborted = threading.Event()
    threading.Thread(target=_listen, args=(connection, orders, aborted), daemon=True).start()
    try:
        maker = make_maker()
    except InputError as error:
        _tell(connection, Failed("invalid_request", str(error)))
        return
    _tell(connection, READY)
    while True:
        end = maker.make(orders.get(), lambda event: _tell(connection, event), aborted.is_set)
        assert isinstance(end, EVENTS_AT_THE_END), "a process alone leads"
        _tell(connection, end)


def _listen(connection: Connection, orders: queue.SimpleQueue[Order], aborted: threading.Event) -> None:
    """Take what the server says while the main thread computes."""
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            # The server has gone, however it ended. Nobody waits for the step that runs.
            os._exit(1)
        if message == ABORT:
            aborted.set()
        else:
            # An abort that came too late was of the video before.
            aborted.clear()
            orders.put(message)


def _tell(connection: Connection, message: object) -> None:
    try:
        connection.send(message)
    except OSError:
        os._exit(1)
