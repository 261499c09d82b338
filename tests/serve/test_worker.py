"""The process that makes videos behind a queue, with a model in it: freed within a step, and replaced where it dies."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from stand_in_maker import KILL

from wan.run.request import Options
from wan.serve.jobs.job import Job, Status, Wish
from wan.serve.jobs.queue import Queue
from wan.serve.workers.dispatcher import Dispatcher
from wan.serve.workers.local_engine import LocalEngine
from wan.serve.workers.maker import Maker
from wan.serve.workers.messages import SAMPLING
from wan.serve.workers.process import ProcessReplica

SMALL = {"sampling": {"steps": 2, "seed": 1}, "video": {"size": "64*48", "frame_num": 5}, "prompt": "A red circle"}
# Steps of a size that takes a while.
LONG = SMALL | {"sampling": {"steps": 1000}, "video": {"size": "128*128", "frame_num": 9}}


class Engine(LocalEngine):
    """That tells which process is the one that makes videos."""

    def start_replica(self) -> ProcessReplica:
        self.replica = super().start_replica()
        return self.replica


@pytest.fixture(scope="module")
def served(random_nano, tmp_path_factory) -> Iterator[tuple[Queue, Engine]]:
    queue = Queue.open(tmp_path_factory.mktemp("outputs"))
    engine = Engine(partial(Maker, Options(device="cpu"), str(random_nano)))
    with Dispatcher(queue, engine):
        yield queue, engine


def submit(queue: Queue, layer: dict[str, Any]) -> str:
    return queue.submit([Wish("small", layer)])[0].id


def completed(queue: Queue, job_id: str) -> Job:
    job = queue.wait(job_id, "", 120)
    assert job is not None and job.status is Status.COMPLETED, job
    return job


def seen(queue: Queue, job_id: str, what: Callable[[Job], bool]) -> float:
    """When a job that runs is seen to be so, on a clock."""
    end = time.perf_counter() + 60
    while not ((job := queue.get(job_id, "")) and what(job)):
        assert time.perf_counter() < end
        time.sleep(0.005)
    return time.perf_counter()


def test_a_worker_is_free_within_a_step_and_a_second_of_the_deletion_of_its_job(served):
    queue, _ = served
    completed(queue, submit(queue, SMALL))
    running, waiting = submit(queue, LONG), submit(queue, SMALL)
    times = [seen(queue, running, lambda job, step=step: job.step >= step) for step in (2, 3, 4)]
    step = times[2] - times[1]
    before = time.perf_counter()
    assert queue.delete(running, "")
    free = seen(queue, waiting, lambda job: job.status is not Status.QUEUED)
    print(f"a step takes {step:.2f} s, and the worker was free {free - before:.2f} s after the deletion")
    assert free - before < max(step, times[1] - times[0]) + 1
    completed(queue, waiting)
    assert not queue.files.path(running, "any").parent.exists()


def test_a_job_whose_worker_is_killed_in_sampling_is_made_again(served):
    queue, engine = served
    job_id = submit(queue, LONG | {"sampling": {"steps": 6}})
    seen(queue, job_id, lambda job: job.stage == SAMPLING and job.step >= 1)
    killed = engine.replica.process.pid
    os.kill(killed, KILL)
    seen(queue, job_id, lambda job: job.status is Status.QUEUED and job.died == 1)
    job = completed(queue, job_id)
    assert (job.died, job.interrupted, job.progress) == (1, 0, 100) and engine.replica.process.pid != killed
    assert {"video.mp4", "video.json", "thumbnail.webp", "spritesheet.webp"} == set(job.files)
