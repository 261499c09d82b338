"""A replica that is a process: what it answers, and how it ends."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from stand_in_maker import CTRL_C, KILL, StandIn, without_a_device

from nabla import InputError
from wan.serve.workers.messages import EVENTS_AT_THE_END, Aborted, Event, Failed, Made, Order
from wan.serve.workers.process import ProcessReplica
from wan.serve.workers.replica import ReplicaDied

LONG = {"steps": 1000, "seconds": 0.02}


def serve(answer: Connection) -> None:
    """Begin a step that takes long, say which process does, and wait."""
    replica = ProcessReplica(StandIn)
    replica.start(order(1, steps=2, seconds=0))
    replica.poll(60)
    replica.start(order(2, seconds=600))
    answer.send(replica.process.pid)
    threading.Event().wait()


def order(number: int, **layer) -> Order:
    return Order(f"video_{number}", layer)


def end_of(replica: ProcessReplica) -> Event:
    while True:
        if isinstance(event := replica.poll(60), EVENTS_AT_THE_END):
            return event


def test_a_process_makes_videos_until_it_is_killed():
    replica = ProcessReplica(StandIn)
    try:
        replica.start(order(1, steps=2, signal=CTRL_C))
        assert [replica.poll(60).step for _ in range(2)] == [1, 2]
        # Ctrl-C in a terminal reaches all its processes, of which this one leaves the end to the server.
        made = end_of(replica)
        assert isinstance(made, Made) and made.files["video.mp4"] == b"video_1" and replica.poll(0) is None
        assert made.files["process"] != str(os.getpid()).encode()
        replica.abort()
        # That came too late, and the next video is made all the same.
        replica.start(order(2))
        assert isinstance(end_of(replica), Made)
        replica.start(order(3, **LONG))
        replica.poll(60)
        before = time.perf_counter()
        replica.abort()
        assert end_of(replica) == Aborted() and time.perf_counter() - before < 5
        replica.start(order(4, broken=True))
        assert end_of(replica) == Failed("internal_error", "CUDA error", broken=True)
        replica.start(order(5, signal=KILL))
        with pytest.raises(ReplicaDied, match="^its process was ended by SIGKILL$"):
            end_of(replica)
        with pytest.raises(ReplicaDied, match="SIGKILL"):
            replica.start(order(6))
        replica.abort()
    finally:
        replica.close()


def test_what_is_wrong_with_how_videos_are_made_is_said_at_the_start():
    with pytest.raises(InputError, match="^device 'cuda:9' cannot be used$"):
        ProcessReplica(without_a_device)


def test_a_process_ends_with_a_server_that_is_killed_while_a_step_runs():
    ours, theirs = multiprocessing.Pipe()
    # Forked, without what torch takes to import.
    server = multiprocessing.get_context("fork").Process(target=serve, args=(theirs,))
    server.start()
    try:
        assert ours.poll(120)
        worker = ours.recv()
        assert is_there(worker)
    finally:
        server.kill()
        server.join()
    until = time.perf_counter() + 10
    while is_there(worker) and time.perf_counter() < until:
        time.sleep(0.02)
    assert not is_there(worker)


def is_there(process: int) -> bool:
    """Whether a process is there and does something; one that nobody has waited for is a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
