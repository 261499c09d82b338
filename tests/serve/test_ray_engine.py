"""Replicas of several processes over Ray, all on this machine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative_error
from places import ROOT
from ray_makers import latents_of, make_maker

from nabla import InputError
from wan.serve.jobs.job import Job, Status, Wish
from wan.serve.jobs.queue import Queue
from wan.serve.workers.dispatcher import Dispatcher
from wan.serve.workers.messages import Aborted, Failed, Made, Order
from wan.serve.workers.replica import ReplicaDied

ray = pytest.importorskip("ray")
from wan.serve.workers.ray_engine import RayEngine, RayReplica, outcome  # noqa: E402

MADE = Made({}, {}, {}, None, None)
WRONG, BUG = Failed("invalid_request", "no such file"), Failed("internal_error", "a bug")


class SmallCluster(RayEngine):
    """It has a place for two replicas, and for none again, as where the machine of one has gone."""

    started: list[RayReplica]

    def start_replica(self) -> RayReplica:
        if len(self.started) == 2:
            raise ReplicaDied("Ray has no place for it")
        self.started.append(super().start_replica())
        return self.started[-1]


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, whose processes find what those of tests do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(Path(__file__).parent))))
        # Ray takes it over, which the tests after these would find.
        before = signal.getsignal(signal.SIGTERM)
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def test_a_video_of_a_process_that_is_killed_is_made_by_another_replica_as_by_one_process(
    cluster, random_nano, tmp_path
):
    makes = partial(make_maker, random_nano, tmp_path)
    engine = SmallCluster(makes, replicas=(0, 2), processes=2, device="cpu", idle_seconds=0)
    engine.started = []
    queue = Queue.open(tmp_path / "jobs")
    with Dispatcher(queue, engine):
        unwanted = submit(queue, steps=1000)
        in_sampling(queue, unwanted)
        # The second replica comes for it.
        guided = submit(queue, steps=8)
        in_sampling(queue, guided)
        staying, lost = engine.started
        os.kill(lost.places[1].pid, signal.SIGKILL)
        until(lambda: queue.get(guided, "").died)
        wrong, unguided = submit(queue, guide_scale=[1.0, 2.0]), submit(queue, steps=2, guide_scale=1.0)
        # The first is free for them.
        queue.delete(unwanted, "")
        jobs = [ended(queue, job_id) for job_id in (guided, unguided)]
        error = ended(queue, wrong).error
        # Nothing waits any more.
        until(lambda: not any(is_there(place.pid) for place in staying.places))
    assert not any(is_there(place.pid) for place in lost.places)
    assert [(job.status, job.died) for job in jobs] == [(Status.COMPLETED, 1), (Status.COMPLETED, 0)], jobs
    assert error.code == "invalid_request" and error.message.startswith("guide_scale 1,2 is for")
    layouts = [queue.files.read(job.id, "video.json") for job in jobs]
    assert b'"cfg": 2' in layouts[0] and b'"ulysses": 2' in layouts[1]
    alone = makes()
    for number, job in enumerate(jobs):
        assert isinstance(alone.make(Order("alone", job.wish.layer), lambda _: None, lambda: False), Made)
        of_two, of_one = (torch.load(latents_of(tmp_path, pid, number)) for pid in (staying.places[0].pid, os.getpid()))
        assert relative_error(of_two, of_one) < 1e-5


def test_replicas_that_came_for_many_jobs_stay_for_a_while(cluster):
    engine = RayEngine(make_maker, replicas=(1, 4), device="cpu", idle_seconds=0.2)
    assert [engine.wanted(*jobs) for jobs in ((0, 0), (1, 1), (5, 2), (0, 1))] == [1, 2, 4, 4]
    time.sleep(0.2)
    assert [engine.wanted(*jobs) for jobs in ((0, 2), (0, 0))] == [2, 2]


def test_a_replica_without_a_place_is_given_up_when_the_server_ends(cluster):
    engine = RayEngine(make_maker, processes=5, device="cpu")
    engine.close()
    with pytest.raises(ReplicaDied):
        engine.start_replica()


@pytest.mark.parametrize(
    "wrong, message",
    (
        ({"replicas": (3, 2)}, "^replicas 3-2 are no range"),
        ({"replicas": (0, 0)}, "^replicas 0-0 are no range"),
        ({"processes": 0}, "^gpus_per_replica 0 is not a positive integer"),
        ({"device": "cuda:1"}, "^device cuda:1: Ray gives each process a GPU of its own; use --device cuda or cpu$"),
    ),
)
def test_wrong_numbers_are_one_line(wrong, message):
    with pytest.raises(InputError, match=message):
        RayEngine(make_maker, **wrong)


@pytest.mark.parametrize(
    "ends, what",
    (
        ([MADE], MADE),
        ([None, MADE], MADE),
        ([Aborted(), Aborted()], Aborted()),
        # Deleted while the first decodes.
        ([None, Aborted()], Aborted()),
        ([BUG], BUG),
        ([WRONG, WRONG], WRONG),
        # These have to begin anew, for one may still send what the other does not wait for.
        ([BUG, BUG], Failed("internal_error", "a bug", broken=True)),
        ([WRONG, None], Failed("invalid_request", "no such file", broken=True)),
    ),
)
def test_what_a_video_came_to_on_several_processes(ends, what):
    assert outcome(ends) == what


def submit(queue: Queue, **sampling: Any) -> str:
    layer = {
        "prompt": "A red circle",
        "video": {"size": "64*48", "frame_num": 5},
        "sampling": {"seed": 1, **sampling},
        "attention": {"algorithm": "nabla", "threshold": 0.5},
    }
    return queue.submit([Wish("small", layer)])[0].id


def in_sampling(queue: Queue, job_id: str) -> None:
    job = until(lambda: (job := queue.get(job_id, "")) and (job.step or job.status.has_ended) and job)
    assert job.status is Status.IN_PROGRESS, job


def ended(queue: Queue, job_id: str) -> Job:
    job = queue.wait(job_id, "", 60)
    assert job is not None and job.status.has_ended
    return job


def until(happens: Callable[[], Any]) -> Any:
    """What a call gives once that is something."""
    end = time.perf_counter() + 120
    while not (found := happens()):
        assert time.perf_counter() < end
        time.sleep(0.02)
    return found


def is_there(process: int) -> bool:
    return os.path.exists(f"/proc/{process}")
