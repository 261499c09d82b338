"""Jobs of a queue handed to replicas: each is made once to the client's eyes, whatever becomes of the replicas."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from stand_in_maker import KILL, ThreadEngine

from wan.serve.jobs.job import Job, Status, Wish
from wan.serve.jobs.queue import Queue
from wan.serve.jobs.store import StorageError
from wan.serve.workers import dispatcher as dispatcher_module
from wan.serve.workers.dispatcher import Dispatcher
from wan.serve.workers.messages import SAMPLING
from wan.serve.workers.replica import ReplicaDied

LONG = {"steps": 100_000, "seconds": 0.005}


@pytest.fixture
def queue(tmp_path) -> Queue:
    return Queue.open(tmp_path)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(dispatcher_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(dispatcher_module, "LOOK_SECONDS", 0.02)


def submit(queue: Queue, **layer: Any) -> str:
    return queue.submit([Wish("small", layer)])[0].id


def ended(queue: Queue, job_id: str) -> Job:
    job = queue.wait(job_id, "", 20)
    assert job is not None and job.status.has_ended
    return job


def until(happens: Callable[[], Any]) -> Any:
    """What a call gives once that is something."""
    end = time.perf_counter() + 20
    while not (found := happens()):
        assert time.perf_counter() < end
        time.sleep(0.01)
    return found


def in_sampling(queue: Queue, job_id: str) -> Job:
    return until(lambda: (job := queue.get(job_id, "")) and job.stage == SAMPLING and job)


def test_jobs_are_made_in_turn_and_kept_with_their_files(queue):
    waiting = [submit(queue) for _ in range(3)]
    engine = ThreadEngine()
    with Dispatcher(queue, engine):
        jobs = [ended(queue, job_id) for job_id in (*waiting, submit(queue, steps=3))]
    assert [job.status for job in jobs] == [Status.COMPLETED] * 4 and len(engine.started) == 1
    assert [job.completed_at for job in jobs] == sorted(job.completed_at for job in jobs)
    last = jobs[-1]
    assert (last.settings, last.seconds, last.kept) == ({"seed": 1}, {"sampling": 1.0}, 0.5)
    assert [queue.files.read(job.id, "video.mp4") for job in jobs] == [job.id.encode() for job in jobs]


def test_a_job_that_is_deleted_ends_and_leaves_nothing(queue):
    with Dispatcher(queue, ThreadEngine()):
        running, waiting, last = submit(queue, **LONG), submit(queue, **LONG), submit(queue)
        assert 0 < in_sampling(queue, running).step < 100_000
        assert queue.delete(running, "") and queue.delete(waiting, "")
        assert ended(queue, last).status is Status.COMPLETED
    assert [path.name for path in queue.files.folder.iterdir() if path.is_dir()] == [last]


def test_a_job_whose_process_ends_is_made_again_but_not_for_ever(queue):
    engine = ThreadEngine()
    with Dispatcher(queue, engine):
        killing, next_one = submit(queue, signal=KILL), submit(queue)
        job = ended(queue, killing)
        assert ended(queue, next_one).status is Status.COMPLETED
    assert (job.status, job.error.code) == (Status.FAILED, "worker_died")
    assert job.error.message.endswith("ended 3 times: its process was ended by SIGKILL")
    # The first replica, and another after each that was lost.
    assert len(engine.started) == 4


def test_a_process_that_is_broken_fails_its_job_and_is_started_again(queue):
    engine = ThreadEngine()
    with Dispatcher(queue, engine):
        broken, next_one = submit(queue, broken=True), submit(queue)
        assert ended(queue, broken).error == ("internal_error", "CUDA error")
        assert ended(queue, next_one).status is Status.COMPLETED
    assert len(engine.started) == 2


def test_a_job_that_runs_when_the_server_ends_is_made_by_the_next_one(queue):
    with Dispatcher(queue, ThreadEngine()):
        job_id = submit(queue, steps=100, seconds=0.02)
        in_sampling(queue, job_id)
    job = queue.get(job_id, "")
    assert (job.status, job.step, job.died, job.interrupted) == (Status.QUEUED, 0, 0, 1)
    # As of a server that was killed.
    assert queue.claim().id == job_id
    with Dispatcher(queue, ThreadEngine()):
        assert ended(queue, job_id).status is Status.COMPLETED


def test_replicas_come_and_go_with_the_queue(queue):
    engine = ThreadEngine(most=3)
    with Dispatcher(queue, engine):
        running = [submit(queue, **LONG) for _ in range(3)]
        for job_id in running:
            in_sampling(queue, job_id)
        for job_id in running[:2]:
            queue.delete(job_id, "")
        until(lambda: sum(replica.is_closed for replica in engine.started) == 2)
        in_sampling(queue, running[2])
        queue.delete(running[2], "")


def test_a_replica_that_cannot_be_started_is_tried_again(queue):
    with Dispatcher(queue, ThreadEngine(fails=[ReplicaDied("no place"), OSError("no more processes")])):
        assert ended(queue, submit(queue)).status is Status.COMPLETED


def test_a_disk_that_is_full_costs_a_job_and_no_replica(queue, monkeypatch):
    engine, keep = ThreadEngine(), queue.files.keep

    def full(job_id, files):
        if files:
            raise StorageError("the server cannot keep video.mp4 (No space left on device)")

    with Dispatcher(queue, engine):
        with monkeypatch.context() as patch:
            patch.setattr(queue.files, "keep", full)
            error = ended(queue, submit(queue)).error
        assert error == ("internal_error", "the server cannot keep video.mp4 (No space left on device)")
        assert queue.files.keep == keep and ended(queue, submit(queue)).status is Status.COMPLETED
    assert len(engine.started) == 1


def test_a_store_that_fails_for_a_while_costs_nothing(queue, monkeypatch):
    engine, failing = ThreadEngine(), ["finish", "claim", "count"]

    def failing_once(name):
        call = getattr(queue.store, name)

        def fail(*args):
            if name in failing:
                failing.remove(name)
                raise OSError("disk I/O error")
            return call(*args)

        return fail

    for name in failing:
        monkeypatch.setattr(queue.store, name, failing_once(name))
    with Dispatcher(queue, engine):
        assert ended(queue, submit(queue)).status is Status.COMPLETED
    assert not failing and len(engine.started) == 1


def test_files_of_a_client_that_are_gone_fail_their_job_and_cost_no_replica(queue):
    [job] = queue.submit([Wish("small", {}, {"image": "cat.png"})], {"cat.png": b"cat"})
    queue.files.path(job.id, "cat.png").unlink()
    engine = ThreadEngine()
    with Dispatcher(queue, engine):
        assert ended(queue, job.id).error.code == "internal_error"
        assert ended(queue, submit(queue)).status is Status.COMPLETED
    assert len(engine.started) == 1
