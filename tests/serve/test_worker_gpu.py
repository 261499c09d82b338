"""What a GPU does to the process that makes videos: too little memory costs a video, an error of CUDA the process."""

from __future__ import annotations

import time
from functools import partial
from itertools import pairwise

import pytest
import torch

from wan.run.request import Options
from wan.serve.workers.maker import Maker
from wan.serve.workers.messages import EVENTS_AT_THE_END, Aborted, Event, Failed, Made, Order, Progress
from wan.serve.workers.process import ProcessReplica

pytestmark = pytest.mark.gpu

SMALL = {"sampling": {"steps": 2, "seed": 1}, "video": {"size": "64*48", "frame_num": 5}, "prompt": "A red circle"}
LARGE = SMALL | {"video": {"size": "1280*720", "frame_num": 81}}
OPTIONS = Options(device="cuda", compile=False)


def asserting(*_: object) -> None:
    """In place of loading a pipeline: a kernel that reads beyond a tensor's end, after which CUDA does nothing more."""
    torch.zeros(1, device="cuda")[torch.full((1,), 5, device="cuda")].item()


def end_of(replica: ProcessReplica, order: Order) -> Event:
    replica.start(order)
    while True:
        if isinstance(event := replica.poll(120), EVENTS_AT_THE_END):
            return event


def test_too_little_memory_fails_one_video(random_nano):
    maker = Maker(OPTIONS, str(random_nano))
    make = partial(maker.make, tell=lambda progress: None, is_aborted=lambda: False)
    assert isinstance(make(Order("video_1", SMALL)), Made)
    torch.cuda.empty_cache()
    # What the small one takes, and little more.
    most = torch.cuda.max_memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(most)
    try:
        failed = make(Order("video_2", LARGE))
        assert isinstance(failed, Failed) and (failed.code, failed.broken) == ("out_of_memory", False)
        assert "the GPU ran out of memory; try a smaller" in failed.message
        made = make(Order("video_3", SMALL))
        assert isinstance(made, Made) and made.peak_bytes and made.seconds["loading"] < 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_an_error_of_cuda_is_told_as_one_that_breaks_the_process(random_nano):
    replica = ProcessReplica(partial(Maker, OPTIONS, str(random_nano), asserting))
    try:
        failed = end_of(replica, Order("video_1", SMALL))
        assert isinstance(failed, Failed) and failed.broken and failed.code == "internal_error"
        assert "device-side assert" in failed.message
    finally:
        replica.close()


def test_a_video_ends_within_a_step_of_its_abort(random_nano):
    replica = ProcessReplica(partial(Maker, OPTIONS, str(random_nano)))
    try:
        replica.start(Order("video_1", LARGE | {"sampling": {"steps": 1000}}))
        times: dict[int, float] = {}
        while len(times) < 4:
            if isinstance(event := replica.poll(120), Progress) and event.step:
                times[event.step] = time.perf_counter()
        step, before = max(after - first for first, after in pairwise(times.values())), time.perf_counter()
        replica.abort()
        while not isinstance(event := replica.poll(120), EVENTS_AT_THE_END):
            pass
        assert event == Aborted() and time.perf_counter() - before < step + 1
        assert isinstance(end_of(replica, Order("video_2", SMALL)), Made)
    finally:
        replica.close()
