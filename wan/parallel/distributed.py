"""The processes of a run under torchrun: their layout, what they tell each other, and how they end together."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from nabla import InputError
from wan.observe.console import ENDING_SIGNALS, EndedBySignal, say
from wan.parallel.layout import ParallelLayout

# Others wait in a collective while one decodes, and torchrun ends the run if one dies: no time-out is needed for that.
TIMEOUT = timedelta(days=7)
START_TIMEOUT = timedelta(minutes=10)
INTERRUPTS = (signal.SIGINT, *ENDING_SIGNALS)
# What a process may take to clean up after a signal, if it is not stuck in a library.
GRACE_SECONDS = 3.0
# How gloo, nccl and the store word it that the other end has gone.
LOST = re.compile(r"connection (was )?(closed|reset|refused)|broken pipe|remote process exited", re.IGNORECASE)


class DistributedContext:
    """This process among those of a run, from `join` under torchrun, else from `connect`; `init_meshes` comes before
    models are loaded.
    """

    def __init__(self, store: dist.Store, device: torch.device):
        self.store, self.device = store, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._meshes: dict[ParallelLayout, tuple[DeviceMesh, DeviceMesh, DeviceMesh]] = {}

    @classmethod
    @contextmanager
    def join(cls, device_name: str | None) -> Iterator[DistributedContext]:
        """Join the others, on nccl for GPUs and gloo for CPUs, for the length of a with statement.

        If that fails or is interrupted, the first process that does says so, and each ends at once with a code of its
        own, 2 for a wrong input: those that wait for it in a collective cannot go on, and torchrun ends them.
        """
        watchdog = _SignalWatchdog()
        context = None
        try:
            device = pick_device(device_name)
            if device.type == "cuda":
                # torchrun leaves each process one thread, too few for a text encoder on the CPU.
                torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
            # Not left to `init_process_group`, which has one time-out for the start and for all later waits.
            store, rank, count = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
            # The store outlives a restart by torchrun, and what was counted in it before is not of this attempt.
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            context = watchdog.context = cls.connect(store, rank, count, device)
            yield context
            context._wait_for_all()
            dist.destroy_process_group()
        except BaseException as error:
            # Before there is a context there is no store to ask in.
            is_first = context is None or context.claim_first_failure()
            _leave(_report(error) if is_first else 1)

    @classmethod
    def connect(cls, store: dist.Store, rank: int, count: int, device: torch.device) -> DistributedContext:
        """Join `count` processes that meet in a store, on nccl for GPUs and gloo for CPUs; all have to at once.

        What fails is raised, here and later, and whoever started the processes has to end them all then.
        """
        store.set_timeout(TIMEOUT)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
        return cls(dist.PrefixStore("wan", store), device)

    def _wait_for_all(self) -> None:
        """Until all are done, since nccl's own end needs all at once; a leader may decode and write for long."""
        if self.store.add("done", 1) == self.world_size:
            self.store.set("all done", "")
        self.store.wait(["all done"], TIMEOUT)

    def init_meshes(self, layout: ParallelLayout) -> None:
        """Set the layout, and the meshes of those that share a video with this one: all, and along each axis.

        Where there is a layout already, pipelines that were loaded in it are of no use in another.
        """
        self.layout = layout
        # Kept, since the connections of a group are never closed.
        if layout not in self._meshes:
            self._meshes[layout] = self._make_meshes(layout)
        self.video_mesh, self.cfg_mesh, self.ulysses_mesh = self._meshes[layout]

    def _make_meshes(self, layout: ParallelLayout) -> tuple[DeviceMesh, DeviceMesh, DeviceMesh]:
        # Neighbours in rank share a sequence, which sends most, so that as little as can be goes between machines.
        ranks = torch.arange(self.world_size).view(layout.replicas, layout.cfg, layout.ulysses)
        # A row for each group: (replicas, rest), (replicas * ulysses, cfg), (replicas * cfg, ulysses).
        video = self._mesh(ranks.flatten(1))
        return video, self._mesh(ranks.movedim(1, -1).flatten(0, 1)), self._mesh(ranks.flatten(0, 1))

    def _mesh(self, groups: Tensor) -> DeviceMesh:
        """The mesh of this process's row. Not by init_device_mesh, whose groups have a time-out of their own."""
        # Every process makes all groups, in one order, also those that it is not in.
        own, _ = dist.new_subgroups_by_enumeration(groups.tolist(), timeout=TIMEOUT)
        return DeviceMesh.from_group(own, self.device.type)

    @property
    def is_leader(self) -> bool:
        """Whether this process reads prompts, decodes and writes for those that share its video."""
        return self.video_mesh.get_local_rank() == 0

    def broadcast_from_leader(self, x: Tensor) -> Tensor:
        """The leader's tensor, in place, on all that share its video."""
        dist.broadcast(x, group=self.video_mesh.get_group(), group_src=0)
        return x

    def broadcast_object_from_leader(self, thing: Any) -> Any:
        """What the leader has, on all that share its video."""
        box = [thing]
        dist.broadcast_object_list(box, group=self.video_mesh.get_group(), group_src=0)
        return box[0]

    def broadcast_object(self, thing: Any) -> Any:
        """What the first of all processes has, on all of them."""
        box = [thing]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def any_of_all(self, wish: bool) -> bool:
        """Whether one of all processes wishes it; all have to ask at once. Over the host, which waits for no GPU."""
        wishes = torch.tensor(int(wish))
        dist.all_reduce(wishes, dist.ReduceOp.MAX)
        return bool(wishes)

    def wait_for_each_other(self) -> None:
        """Until all processes are here. Over the host, which waits for no GPU."""
        dist.all_reduce(torch.zeros(1))

    def claim_jobs(self, count: int) -> Iterator[int]:
        """Numbers below `count`, each for one replica, which takes the next whenever it is done with one."""
        while True:
            number = torch.zeros(1, dtype=torch.int64, device=self.device)
            if self.is_leader:
                # A replica's leader counts for all of it, or its processes would each take another prompt.
                number += self.store.add("jobs", 1) - 1
            job = int(self.broadcast_from_leader(number).item())
            if job >= count:
                return
            yield job

    def claim_first_failure(self) -> bool:
        """Whether this process is the first that reports a failure; the others fail for its absence, or likewise."""
        try:
            return self.store.add("failures", 1) == 1
        except RuntimeError:  # the store has gone with the process that failed
            return False


def started_by_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ


def device_named(name: str | None) -> torch.device:
    """The device of that name, or the GPU if there is one, without using it: that would take some of its memory.

    Raises `InputError` if it is not there, as far as that can be told.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise InputError(f"device {name!r} is not known; try --device cpu") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} is not here, where there are {torch.cuda.device_count()}; try --device cpu")
    return device


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or the GPU if there is one; under torchrun, of the GPUs this process's own.

    Raises `InputError` if it is not there.
    """
    own = name
    if started_by_torchrun() and torch.cuda.is_available() and (name or "cuda").startswith("cuda"):
        index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if name not in (None, "cuda"):
            raise InputError(f"device {name}: torchrun gives each process a GPU of its own; use --device cuda or cpu")
        if index >= count:
            raise InputError(f"process {index} of this machine has no GPU of its own, of {count}; start fewer")
        own = f"cuda:{index}"
        torch.cuda.set_device(index)
    try:
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(chosen if own is None else own)
        # Only use shows that a device works; the number shows that it holds data, unlike meta.
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError, OverflowError) as error:  # unknown, meta, or not in this torch
        reason = str(error).strip().splitlines()[0][:300]
        raise InputError(f"device {name!r} cannot be used ({reason}); try --device cpu") from None
    return device


def has_lost_another(error: BaseException) -> bool:
    """Whether an error of this process is only that another has gone."""
    return isinstance(error, RuntimeError) and LOST.search(str(error)) is not None


def _report(error: BaseException) -> int:
    """Say why this process ends, and return its exit code."""
    rank = os.environ["RANK"]
    if isinstance(error, InputError):
        say(f"error: {error}")
        return 2
    if isinstance(error, (KeyboardInterrupt, EndedBySignal)):
        say("interrupted; no half-written file is left")
        return 130
    if has_lost_another(error):
        reason = " ".join(str(error).split())[:500]
        say(f"error: process {rank} lost another, which was killed or cut off: {reason}")
    else:
        say(f"process {rank} failed:")
        traceback.print_exception(error)
    return 1


def _leave(code: int) -> NoReturn:
    """Exit without the library's own end, which would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _SignalWatchdog:
    """Makes SIGINT, SIGTERM and SIGHUP interrupt the main thread, and end the process if that is stuck.

    Python handles signals between its own instructions alone, so a process that waits in a library would ignore them.
    """

    def __init__(self) -> None:
        self.context: DistributedContext | None = None
        self.receiving, sending = socket.socketpair()
        # As `set_wakeup_fd` wants it.
        sending.setblocking(False)
        self.sending = sending
        # Python raises KeyboardInterrupt in the main thread for each, when that comes back from a library.
        for number in INTERRUPTS:
            signal.signal(number, signal.default_int_handler)
        # Written to by C code at once, whichever thread a signal meets and wherever the main one waits.
        signal.set_wakeup_fd(sending.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while self.receiving.recv(1)[0] not in INTERRUPTS:
            pass
        # A main thread that is not stuck ends the process meanwhile, and this thread with it.
        time.sleep(GRACE_SECONDS)
        if self.context is None or self.context.claim_first_failure():
            say("interrupted")
        os._exit(130)
