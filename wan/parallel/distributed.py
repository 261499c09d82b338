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
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from nabla import InputError
from wan.observe.console import ENDING_SIGNALS, Ended, say

# Others wait in a collective while one decodes, and torchrun ends the run if one dies: no time-out is needed for that.
TIMEOUT = timedelta(days=7)
START_TIMEOUT = timedelta(minutes=10)
INTERRUPTS = (signal.SIGINT, *ENDING_SIGNALS)
# What a process may take to clean up after a signal, if it is not stuck in a library.
GRACE_SECONDS = 3.0
LOST = re.compile(r"connection (was )?(closed|reset|refused)|broken pipe|remote process exited", re.IGNORECASE)


@dataclass(frozen=True)
class Layout:
    """How many ways a run is split: prompts over replicas, guidance branches, and the sequence of tokens."""

    replicas: int = 1
    cfg: int = 1
    ulysses: int = 1

    @property
    def sharing(self) -> int:
        """How many processes share a video."""
        return self.cfg * self.ulysses

    def describe(self) -> str:
        ways = {"replicas": self.replicas, "guidance branches": self.cfg, "ways of the sequence": self.ulysses}
        split = " x ".join(f"{count} {what}" for what, count in ways.items() if count > 1)
        return f"{self.replicas * self.sharing} processes: {split or 'one video'}"


def choose_layout(
    processes: int,
    heads: int,
    guided: bool,
    prompts: int = 1,
    sharded: bool = False,
    replicas: int | None = None,
    cfg: int | None = None,
    ulysses: int | None = None,
) -> Layout:
    """The layout for so many processes, with what is asked for; the rest is chosen.

    Several prompts go to replicas, which send each other nothing, as far as none is idle at the end, and unless weights
    are sharded over those that share a video. Guidance branches come next, which send least; then the sequence, of at
    most as many ways as heads.
    guided: whether there are two guidance branches that can run apart
    Raises `InputError` if nothing fits.
    """
    for name, value in (("replicas", replicas), ("cfg_size", cfg), ("ulysses_size", ulysses)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value} is not a positive integer")
    if cfg is not None and cfg > 1 + guided:
        reason = "there are two guidance branches" if guided else "guidance is off, or its branches share masks"
        raise InputError(f"cfg_size {cfg} is too many: {reason}; leave it out")
    if ulysses is not None and ulysses > heads:
        raise InputError(f"ulysses_size {ulysses} is more than the {heads} heads of the model; lower it")
    found = [
        Layout(r, c, processes // (r * c))
        for r in ([replicas] if replicas else range(1, min(prompts, processes) + 1))
        for c in ([cfg] if cfg else (1, 2) if guided else (1,))
        if processes % (r * c) == 0 and processes // (r * c) <= heads
    ]
    found = [layout for layout in found if ulysses in (None, layout.ulysses)]
    if not found:
        asked = {"replicas": replicas, "cfg_size": cfg, "ulysses_size": ulysses}
        named = ", ".join(f"{name} {value}" for name, value in asked.items() if value) or "no size asked for"
        raise InputError(
            f"{processes} processes cannot be laid out ({named}): replicas (of {prompts} to make) x cfg_size (up to "
            f"{1 + guided}) x ulysses_size (up to {heads}) must be {processes}; start another number, or change a size"
        )

    def cost(layout: Layout) -> tuple[int, int, int]:
        # Rounds of videos, by the time that each takes.
        time = -(-prompts // layout.replicas) * layout.replicas
        return layout.replicas if sharded else time, -layout.replicas, -layout.cfg

    return min(found, key=cost)


class Processes:
    """This process among those that torchrun started, from `together`; `lay_out` comes before models are loaded."""

    def __init__(self, store: dist.Store, device: torch.device):
        self.store, self.device = store, device
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    @classmethod
    @contextmanager
    def together(cls, device_name: str | None) -> Iterator[Processes]:
        """Join the others, on nccl for GPUs and gloo for CPUs, for the length of a with statement.

        If that fails or is interrupted, the first process that does says so, and each ends at once with a code of its
        own, 2 for a wrong input: those that wait for it in a collective cannot go on, and torchrun ends them.
        """
        watch = _Watch()
        processes = None
        try:
            device = pick_device(device_name)
            if device.type == "cuda":
                # torchrun leaves each process one thread, too few for a text encoder on the CPU.
                torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
            store, rank, count = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
            # The store outlives a restart by torchrun.
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            store.set_timeout(TIMEOUT)
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
            processes = watch.processes = cls(dist.PrefixStore("wan", store), device)
            yield processes
            processes._wait_for_all()
            dist.destroy_process_group()
        except BaseException as error:
            is_first = processes is None or processes.fails_first()
            _leave(_report(error) if is_first else 1)

    def _wait_for_all(self) -> None:
        """Until all are done, since nccl's own end needs all at once; a leader may decode and write for long."""
        if self.store.add("done", 1) == self.count:
            self.store.set("all done", "")
        self.store.wait(["all done"], TIMEOUT)

    def lay_out(self, layout: Layout) -> None:
        """Set the layout, and the meshes of those that share a video with this one: all, and along each axis."""
        self.layout = layout
        ranks = torch.arange(self.count).view(layout.replicas, layout.cfg, layout.ulysses)
        self.sharing = self._mesh(ranks.flatten(1))
        self.branches = self._mesh(ranks.movedim(1, -1).flatten(0, 1))
        self.sequence = self._mesh(ranks.flatten(0, 1))

    def _mesh(self, groups: Tensor) -> DeviceMesh:
        """The mesh of this process's row. Not by init_device_mesh, whose groups have a time-out of their own."""
        own, _ = dist.new_subgroups_by_enumeration(groups.tolist(), timeout=TIMEOUT)
        return DeviceMesh.from_group(own, self.device.type)

    @property
    def leads(self) -> bool:
        """Whether this process reads prompts, decodes and writes for those that share its video."""
        return self.sharing.get_local_rank() == 0

    def from_leader(self, x: Tensor) -> Tensor:
        """The leader's tensor, in place, on all that share its video."""
        dist.broadcast(x, group=self.sharing.get_group(), group_src=0)
        return x

    def from_first(self, thing: Any) -> Any:
        """What the first of all processes has."""
        box = [thing]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def take_jobs(self, count: int) -> Iterator[int]:
        """Numbers below `count`, each for one replica, which takes the next whenever it is done with one."""
        while True:
            number = torch.zeros(1, dtype=torch.int64, device=self.device)
            if self.leads:
                number += self.store.add("jobs", 1) - 1
            number = self.from_leader(number).item()
            if number >= count:
                return
            yield number

    def fails_first(self) -> bool:
        """Whether this process is the first that reports a failure; the others fail for its absence, or likewise."""
        try:
            return self.store.add("failures", 1) == 1
        except RuntimeError:  # the store has gone with the process that failed
            return False


def started_by_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ


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
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError, OverflowError) as error:  # unknown, meta, or not in this torch
        reason = str(error).strip().splitlines()[0][:300]
        raise InputError(f"device {name!r} cannot be used ({reason}); try --device cpu") from None
    return device


def _report(error: BaseException) -> int:
    """Say why this process ends, and return its exit code."""
    rank = os.environ["RANK"]
    if isinstance(error, InputError):
        say(f"error: {error}")
        return 2
    if isinstance(error, (KeyboardInterrupt, Ended)):
        say("interrupted; no half-written file is left")
        return 130
    if isinstance(error, RuntimeError) and LOST.search(str(error)):
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


class _Watch:
    """Makes SIGINT, SIGTERM and SIGHUP interrupt the main thread, and end the process if that is stuck.

    Python handles signals between its own instructions alone, so a process that waits in a library would ignore them.
    """

    def __init__(self) -> None:
        self.processes: Processes | None = None
        self.receiving, sending = socket.socketpair()
        sending.setblocking(False)
        self.sending = sending
        for number in INTERRUPTS:
            signal.signal(number, signal.default_int_handler)
        # Written to whichever thread a signal meets.
        signal.set_wakeup_fd(sending.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while self.receiving.recv(1)[0] not in INTERRUPTS:
            pass
        time.sleep(GRACE_SECONDS)
        if self.processes is None or self.processes.fails_first():
            say("interrupted")
        os._exit(130)
