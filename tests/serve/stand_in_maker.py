"""What stands in for a model in tests of processes: it sleeps instead of sampling, and does what its order says."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence

from nabla import InputError
from wan.serve.workers.messages import SAMPLING, Aborted, Event, Failed, Made, Order, Progress
from wan.serve.workers.process import MakesVideos
from wan.serve.workers.replica import ReplicaDied


class StandIn:
    """Orders say how many "steps" there are, how many "seconds" each takes, and what happens after the first one:
    a "signal" to this process, or a failure that is "broken".
    """

    def make(
        self, order: Order, tell: Callable[[Progress], None], is_aborted: Callable[[], bool]
    ) -> Made | Failed | Aborted:
        steps = order.layer.get("steps", 1)
        for step in range(steps):
            time.sleep(order.layer.get("seconds", 0))
            tell(Progress(SAMPLING, step + 1, steps))
            if number := order.layer.get("signal"):
                os.kill(os.getpid(), number)
            if order.layer.get("broken"):
                return Failed("internal_error", "CUDA error", broken=True)
            if is_aborted():
                return Aborted()
        process = str(os.getpid()).encode()
        return Made({"video.mp4": order.job_id.encode(), "process": process}, {"seed": 1}, {"sampling": 1.0}, None, 0.5)


def without_a_device() -> StandIn:
    raise InputError("device 'cuda:9' cannot be used")


KILL, CTRL_C = int(signal.SIGKILL), int(signal.SIGINT)


class ThreadReplica:
    """A replica without a process; what an order's "signal" would do to one is told of it all the same."""

    def __init__(self, maker: MakesVideos):
        self.maker = maker
        self.events: queue.SimpleQueue[Event | ReplicaDied] = queue.SimpleQueue()
        self.aborted = threading.Event()
        self.is_closed = False

    def start(self, order: Order) -> None:
        self.aborted.clear()
        threading.Thread(target=self._make, args=(order,)).start()

    def _make(self, order: Order) -> None:
        if order.layer.get("signal"):
            self.events.put(ReplicaDied("its process was ended by SIGKILL"))
        else:
            self.events.put(self.maker.make(order, self.events.put, self.aborted.is_set))

    def poll(self, seconds: float) -> Event | None:
        try:
            event = self.events.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(event, ReplicaDied):
            raise event
        return event

    def abort(self) -> None:
        self.aborted.set()

    def close(self) -> None:
        self.aborted.set()
        self.is_closed = True


class ThreadEngine:
    """Starts replicas that are threads, as many as there are jobs up to some. fails: what each start raises, in turn"""

    def __init__(self, most: int = 1, fails: Sequence[Exception] = (), maker: MakesVideos | None = None):
        self.most, self.fails = most, list(fails)
        self.maker = maker or StandIn()
        self.started: list[ThreadReplica] = []

    def start_replica(self) -> ThreadReplica:
        if self.fails:
            raise self.fails.pop(0)
        self.started.append(ThreadReplica(self.maker))
        return self.started[-1]

    def wanted(self, waiting: int, running: int) -> int:
        return min(self.most, max(1, waiting + running))

    def close(self) -> None:
        assert all(replica.is_closed for replica in self.started)
