"""A replica that is one process of this machine."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
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
# Not multiprocessing, which runs the main program's file again, and whose locks a process that is killed leaves behind.
PROGRAM = "import sys; sys.path[:] = {path}; from wan.serve.workers.process import work; work({pipe})"


class MakesVideos(Protocol):
    """What a process makes videos by: `wan.serve.workers.maker.Maker`."""

    def make(
        self, order: Order, tell: Callable[[Progress], None], is_aborted: Callable[[], bool]
    ) -> Made | Failed | Aborted | None: ...


class ProcessReplica:
    """A `Replica` of one process, which ends with this one, however that ends.

    make_maker: makes in that process what makes its videos; has to be of a module that can be imported, for pickle
    Raises `ReplicaDied` if the process does not come up, and `InputError` for what `make_maker` finds wrong.
    """

    def __init__(self, make_maker: Callable[[], MakesVideos]):
        near, far = socket.socketpair()
        program = PROGRAM.format(path=sys.path, pipe=far.fileno())
        # In a session of its own, so that Ctrl-C does not reach it before it has learnt to leave that to the server.
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.DEVNULL, pass_fds=[far.fileno()], start_new_session=True
        )
        far.close()
        self.connection = Connection(near.detach())
        try:
            with suppress(OSError):
                self.connection.send(make_maker)
            if isinstance(said := self._receive(), Failed):
                raise InputError(said.message)
        except BaseException:
            # It may go on without its pipe.
            self.close()
            raise

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
        self.process.kill()
        self.process.wait()
        self.connection.close()

    def _receive(self) -> Event:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            raise self._died() from None

    def _died(self) -> ReplicaDied:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_SECONDS)
        code = self.process.returncode
        if code is not None and code < 0:
            return ReplicaDied(f"its process was ended by {signal.Signals(-code).name}")
        return ReplicaDied("its process has let go of its pipe" if code is None else f"its process ended with {code}")


def work(pipe: int) -> None:
    """What the process of a replica does, until it is ended. pipe: a descriptor of the server's connection"""
    for number in SIGNALS_OF_THE_SERVER:
        signal.signal(number, signal.SIG_IGN)
    log_to_stderr()
    connection = Connection(pipe)
    try:
        make_maker: Callable[[], MakesVideos] = connection.recv()
    except EOFError:
        # A server that was gone again at once.
        return
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
