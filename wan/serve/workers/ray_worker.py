"""A process of a replica, as an actor of Ray: what `wan.serve.workers.ray_engine` starts."""

from __future__ import annotations

import logging
import os
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import ray
import torch
import torch.distributed as dist

from wan.observe.console import log_to_stderr
from wan.parallel.distributed import START_TIMEOUT, DistributedContext, pick_device
from wan.serve.workers.messages import Event, Order, Progress
from wan.serve.workers.process import MakesVideos


class MakeMaker(Protocol):
    """Makes what makes the videos of a process; `processes`: those that share each. Has to be of a kind that pickle
    takes.
    """

    def __call__(self, *, processes: DistributedContext | None = None) -> MakesVideos: ...


class Place(NamedTuple):
    """Where a process runs."""

    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class RayWorker:
    """One of the processes that share a video, or one alone."""

    def __init__(self, make_maker: MakeMaker):
        log_to_stderr()
        self._make_maker = make_maker
        # Which GPU is used, and how many cores, is chosen for one thread of Python, by that.
        self._thread = ThreadPoolExecutor(1)
        self._aborted = ""

    def place(self) -> Place:
        return Place(ray.util.get_node_ip_address(), os.getpid())

    def open_store(self, count: int) -> tuple[str, int]:
        """Where `count` processes can meet: host and port of a store in this one."""
        host = ray.util.get_node_ip_address()
        self._store = dist.TCPStore(host, 0, count, is_master=True, timeout=START_TIMEOUT, wait_for_workers=False)
        return host, self._store.port

    def begin(self, meeting: tuple[str, int] | None, rank: int, count: int) -> None:
        """Be ready for videos, with the others of the replica. Raises what `make_maker` does."""
        self._thread.submit(self._begin, meeting, rank, count).result()

    def _begin(self, meeting: tuple[str, int] | None, rank: int, count: int) -> None:
        # Warnings only, of those that do not lead.
        logging.getLogger("wan").setLevel(logging.INFO if rank == 0 else logging.WARNING)
        torch.set_num_threads(_own_cores())
        self._processes = None
        if meeting is not None:
            device = _own_device()
            store = dist.TCPStore(*meeting, count, is_master=False, timeout=START_TIMEOUT)
            self._processes = DistributedContext.connect(store, rank, count, device)
        self._maker = self._make_maker(processes=self._processes)

    def make(self, order: Order) -> Iterator[Event | None]:
        """What happens to a video, and at last what it came to: None on a process that does not lead."""
        told: queue.SimpleQueue[Progress | None] = queue.SimpleQueue()
        leads = self._processes is None or self._processes.rank == 0
        tell = told.put if leads else _tell_nobody
        end = self._thread.submit(self._maker.make, order, tell, lambda: self._is_aborted(order.job_id))
        end.add_done_callback(lambda _: told.put(None))
        while (progress := told.get()) is not None:
            yield progress
        yield end.result()

    def abort(self, job_id: str) -> None:
        """Nobody wants a video any more; heeded on the process that leads."""
        self._aborted = job_id

    def _is_aborted(self, job_id: str) -> bool:
        own = self._aborted == job_id
        return own if self._processes is None else self._processes.any_of_all(own)


def _tell_nobody(progress: Progress) -> None:
    """What processes that do not lead have to say is said by the one that does."""


def _own_device() -> torch.device:
    """The device that Ray has given this process, which sees those of others as well."""
    numbers = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    if not numbers:
        return pick_device("cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    index = int(numbers[0]) if visible is None else visible.split(",").index(numbers[0])
    torch.cuda.set_device(index)
    return pick_device(f"cuda:{index}")


def _own_cores() -> int:
    """A GPU's share of its machine's cores, or the one core of a process without a GPU."""
    if not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        return 1
    own = ray.get_runtime_context().get_node_id()
    has = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == own)
    return max(1, int(has["CPU"] // has["GPU"]))
