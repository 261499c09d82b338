"""Replicas on the machines of a Ray cluster, or on this one alone (https://docs.ray.io).

Ray finds places for their processes, starts and ends them, and knows which have died. What those that share a video
send each other goes by torch.distributed, in the layouts of `wan.parallel`.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from nabla import InputError
from nabla.checks import is_count
from wan.parallel.distributed import START_TIMEOUT
from wan.serve.workers.messages import Aborted, Event, Failed, Made, Order, Progress
from wan.serve.workers.ray_worker import MakeMaker, Place, RayWorker
from wan.serve.workers.replica import ReplicaDied

log = logging.getLogger("wan")

# What a cluster may take to find a place: one that grows with what is asked of it starts a machine.
START_SECONDS = START_TIMEOUT.total_seconds()
# How long replicas that were added for jobs stay without any: loading a model again takes minutes.
IDLE_SECONDS = 300.0
# Between the end of one process of a video, by an error, and that of the others, unless they wait for it.
PATIENCE_SECONDS = 10.0
# Has Ray leave a process the sight of its machine's other GPUs, which it may write to only if it sees them.
SEE_ALL_GPUS = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}


class RayEngine:
    """An `Engine` of several replicas, each of one process or of several that share every video.

    replicas: the least and the most; those beyond the least come with the jobs that wait, and go when these are made
    processes: of a replica, each with a GPU of its own
    device: "cpu" or "cuda"; None: GPUs if the cluster has any
    Joins the cluster that Ray's own RAY_ADDRESS names or that this machine is of, else starts one of this machine
    alone. Raises `InputError` if that cannot be, and for numbers that make no sense.
    """

    def __init__(
        self,
        make_maker: MakeMaker,
        replicas: tuple[int, int] = (1, 1),
        processes: int = 1,
        device: str | None = None,
        idle_seconds: float = IDLE_SECONDS,
    ):
        self.least, self.most = replicas
        if not (is_count(self.least) and is_count(self.most) and self.least <= self.most > 0):
            raise InputError(f"replicas {self.least}-{self.most} are no range; give N, or MIN-MAX with MAX above 0")
        if not (is_count(processes) and processes > 0):
            raise InputError(f"gpus_per_replica {processes!r} is not a positive integer")
        if device not in (None, "cpu", "cuda"):
            raise InputError(f"device {device}: Ray gives each process a GPU of its own; use --device cuda or cpu")
        self.make_maker, self.processes, self.idle_seconds = make_maker, processes, idle_seconds
        self._starts_ray = not ray.is_initialized()
        if self._starts_ray:
            _join_cluster()
        self.on_gpus = device == "cuda" or (device is None and ray.cluster_resources().get("GPU", 0) > 0)
        self._kept, self._busy_at = self.least, time.monotonic()
        self._closing = threading.Event()

    def wanted(self, waiting: int, running: int) -> int:
        """As many as there are jobs, within the bounds; fewer than before only once they are too many for a while."""
        needed = min(max(waiting + running, self.least), self.most)
        now = time.monotonic()
        if needed >= self._kept or now - self._busy_at >= self.idle_seconds:
            self._kept, self._busy_at = needed, now
        return self._kept

    def start_replica(self) -> RayReplica:
        """A replica, once the cluster has a place for it. Raises `InputError` for what `make_maker` finds wrong."""
        if self._closing.is_set():
            raise ReplicaDied("the server ends")
        bundle = {"CPU": 1, "GPU": 1} if self.on_gpus else {"CPU": 1}
        # On one machine if there is one with so much left.
        group = placement_group([bundle] * self.processes, strategy="PACK")
        try:
            self._await(group)
            return RayReplica(group, self._begin(group))
        except BaseException as error:
            # Its processes end with it.
            remove_placement_group(group)
            if isinstance(error, RayTaskError) and isinstance(error.cause, InputError):
                raise error.cause from None
            if isinstance(error, RayError):
                raise ReplicaDied(f"its processes did not start: {_line(error)}") from error
            raise

    def _await(self, group: PlacementGroup) -> None:
        if group.wait(2):
            return
        left = {what: ray.available_resources().get(what, 0) for what in ("CPU", "GPU")}
        each = "a CPU and a GPU" if self.on_gpus else "a CPU"
        no_place = f"Ray has no place for {self.processes} processes with {each} each; it has {left} left"
        log.info("replica: %s, and waits for one", no_place)
        until = time.monotonic() + START_SECONDS
        while not group.wait(1):
            if self._closing.is_set() or time.monotonic() > until:
                raise ReplicaDied(no_place)

    def _begin(self, group: PlacementGroup) -> list[Worker]:
        """The processes of a replica, which have met each other."""
        how: dict[str, Any] = {"num_cpus": 1, "num_gpus": int(self.on_gpus)}
        if self.on_gpus and self.processes > 1:
            how["runtime_env"] = SEE_ALL_GPUS
        actors: list[Any] = []
        for number in range(self.processes):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
            # Beside a video, which one thread makes, another can be told that nobody wants it.
            own = ray.remote(RayWorker).options(max_concurrency=2, scheduling_strategy=strategy, **how)
            actors.append(own.remote(self.make_maker))
        places = ray.get([actor.place.remote() for actor in actors], timeout=START_SECONDS)
        # By machine, since neighbours in rank send each other most.
        workers = [Worker(*pair) for pair in sorted(zip(places, actors), key=lambda pair: pair[0])]
        meeting = None if self.processes == 1 else ray.get(workers[0].actor.open_store.remote(self.processes))
        begun = [one.actor.begin.remote(meeting, rank, self.processes) for rank, one in enumerate(workers)]
        ray.get(begun, timeout=START_SECONDS)
        log.info("replica: %s", ", ".join(str(one.place) for one in workers))
        return workers

    def close(self) -> None:
        self._closing.set()
        if self._starts_ray:
            ray.shutdown()


class Worker(NamedTuple):
    """A process of a replica, from outside. actor: Ray's handle of its `RayWorker`"""

    place: Place
    actor: Any


class RayReplica:
    """A `Replica` of the processes in a placement group, the first of which leads."""

    def __init__(self, group: PlacementGroup, workers: Sequence[Worker]):
        self.group, self.workers = group, workers
        self.places = [one.place for one in workers]
        self._job = ""
        # By what each process tells of the video, those that have not come to their end; and what the others came to.
        self._telling: dict[Any, Place] = {}
        self._ends: list[Made | Failed | Aborted | None] = []
        self._failed_at = float("inf")

    def start(self, order: Order) -> None:
        self._job, self._ends, self._failed_at = order.job_id, [], float("inf")
        # Sent to each machine once, with the pictures in it.
        sent = ray.put(order)
        self._telling = {one.actor.make.remote(sent): one.place for one in self.workers}

    def poll(self, seconds: float) -> Event | None:
        until = time.monotonic() + seconds
        while self._telling:
            ready, _ = ray.wait(list(self._telling), timeout=max(0.0, until - time.monotonic()))
            if not ready:
                is_late = time.monotonic() - self._failed_at > PATIENCE_SECONDS
                return outcome([*self._ends, None]) if is_late else None
            event = self._next(ready[0])
            if isinstance(event, Progress):
                return event
            del self._telling[ready[0]]
            self._ends.append(event)
            if isinstance(event, Failed):
                self._failed_at = min(self._failed_at, time.monotonic())
        # Only once all are at their end: where one has died, another may fail for its absence and tell so before.
        ends, self._ends = self._ends, []
        return outcome(ends) if ends else None

    def _next(self, told: Any) -> Progress | Made | Failed | Aborted | None:
        try:
            return ray.get(next(told))
        except RayError as error:
            # Clients are told the one, and the log the other, which names machines.
            log.warning("warning: %s: %s", self._telling[told], _line(error))
            raise ReplicaDied("a process of it has died, or its machine cannot be reached") from error

    def abort(self) -> None:
        self.workers[0].actor.abort.remote(self._job)

    def close(self) -> None:
        # Else they have ended with Ray.
        if ray.is_initialized():
            for one in self.workers:
                ray.kill(one.actor)
            remove_placement_group(self.group)


def outcome(ends: Sequence[Made | Failed | Aborted | None]) -> Made | Failed | Aborted:
    """What a video came to, of what it came to on each process that shared it; None: not at its end, or does not lead.

    Processes that did not fail all at once by a wrong wish may be out of step, and take for the next video's what was
    sent of this one; then the failure is `broken`.
    """
    end = next((one for one in ends if isinstance(one, Failed)), None)
    if end is None:
        return next(one for one in ends if one is not None)
    in_step = len(ends) == 1 or (end.code == "invalid_request" and all(one == end for one in ends))
    return end if in_step else replace(end, broken=True)


def _join_cluster() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=True, logging_level=logging.WARNING, include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"Ray cannot be joined or started ({_line(error)}); see RAY_ADDRESS and ray status") from error
    if threading.current_thread() is threading.main_thread():
        # Ray has taken it over, for an end at which nothing is given back to the queue.
        signal.signal(signal.SIGTERM, before)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
