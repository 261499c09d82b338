"""Jobs and their files together, as clients and those who make videos see them."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest

from wan.serve.jobs import files as job_files
from wan.serve.jobs import keeping
from wan.serve.jobs import queue as job_queue
from wan.serve.jobs.files import JobFiles
from wan.serve.jobs.job import JobError, Status, Wish, new_id
from wan.serve.jobs.keeping import tidy
from wan.serve.jobs.queue import Queue
from wan.serve.jobs.store import QueueFull, QueueLimits, StorageError
from wan.serve.workers.messages import InputFile, Made, Progress

WISH = Wish("nabla_0.7", {"prompt": "A cat"})
MADE = Made({"video.mp4": b"mp4", "video.json": b"{}"}, {"seed": 4}, {"decode": 1.0}, None, 0.2)


@pytest.fixture
def queue(tmp_path):
    opened = Queue.open(tmp_path / "outputs", keep_seconds=60)
    yield opened
    opened.close()


def names(queue: Queue, job_id: str) -> list[str]:
    folder = queue.files.folder / job_id
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_job_from_its_picture_to_its_video(queue):
    wish = replace(WISH, inputs={"image": "image.png"})
    [job] = queue.submit([wish], {"image.png": b"png"})
    assert queue.order(queue.claim()).inputs == {"image": InputFile("image.png", b"png")}
    assert queue.tell(job.id, Progress("sampling", 1, 2, preview=b"jpg"))
    assert names(queue, job.id) == ["image.png", "preview.jpg"] and queue.get(job.id, "").progress == 50
    assert queue.finish(job.id, MADE)
    done = queue.get(job.id, "")
    assert done.status is Status.COMPLETED and done.expires_at == pytest.approx(done.completed_at + 60, abs=5)
    assert names(queue, job.id) == ["image.png", "video.json", "video.mp4"]
    assert done.files == ("video.mp4", "video.json") and queue.files.read(job.id, "video.mp4") == b"mp4"
    assert queue.delete(job.id, "") and names(queue, job.id) == []


def test_a_job_of_another_is_not_there(queue):
    [job] = queue.submit([replace(WISH, owner="a")])
    assert queue.get(job.id, "a") == job and queue.get(job.id, "b") is None and queue.list("b").jobs == []
    assert not queue.delete(job.id, "b") and queue.delete(job.id, "a") and not queue.delete(job.id, "a")


def test_nothing_is_left_of_a_request_that_is_refused_or_known(queue):
    limited = replace(queue, limits=QueueLimits(waiting=2))
    first = limited.submit([replace(WISH, key="k")], {"image.png": b"png"})
    assert limited.submit([replace(WISH, key="k")], {"image.png": b"png"}) == first
    with pytest.raises(QueueFull):
        limited.submit([WISH, WISH], {"image.png": b"png"})
    assert [path.name for path in queue.files._folders()] == [first[0].id]


def test_nothing_is_left_of_a_job_that_was_deleted_while_it_was_made(queue):
    heard = [
        lambda job: queue.tell(job.id, Progress("sampling", preview=b"jpg")),
        lambda job: queue.finish(job.id, MADE),
        lambda job: queue.fail(job.id, JobError("internal_error", "")),
        lambda job: queue.give_back(job, "SIGKILL"),
    ]
    for hear in heard:
        [job] = queue.submit([WISH])
        queue.claim()
        queue.delete(job.id, "")
        assert not hear(job) and names(queue, job.id) == []


def test_a_job_may_be_deleted_while_its_files_are_written(queue):
    def write() -> None:
        while not ended.is_set():
            with suppress(StorageError):
                queue.files.keep(job.id, {"a": b"1", "b": b"2"})

    [job] = queue.submit([WISH])
    ended = threading.Event()
    writer = threading.Thread(target=write)
    writer.start()
    assert queue.delete(job.id, "")
    for _ in range(50):
        queue.files.delete(job.id)
    ended.set()
    writer.join()
    queue.files.delete(job.id)
    assert names(queue, job.id) == []


def test_a_job_that_ends_its_process_each_time_has_failed(queue):
    [job] = queue.submit([WISH])
    for _ in range(5):
        queue.give_back(queue.claim())
    for _ in range(3):
        queue.give_back(queue.claim(), "killed by SIGSEGV")
    failed = queue.get(job.id, "")
    assert (failed.status, failed.interrupted, failed.died) == (Status.FAILED, 5, 2)
    assert failed.error == ("worker_died", "the process that made this video ended 3 times: killed by SIGSEGV")


def test_who_waits_is_told_at_the_end(queue, monkeypatch):
    monkeypatch.setattr(job_queue, "LOOK_SECONDS", 0.01)
    [job] = queue.submit([WISH])
    assert queue.wait(job.id, "", 0.02) == job and queue.wait(new_id(), "", 9) is None
    ender = threading.Timer(0.05, lambda: queue.finish(queue.claim().id, MADE))
    ender.start()
    assert queue.wait(job.id, "", 60).status is Status.COMPLETED
    ender.join()


def test_a_full_disk_is_said_without_a_path(queue, monkeypatch, tmp_path):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="cannot keep the files of a job .No space left on device.$"):
        queue.submit([WISH], {"image.png": b"png"})
    assert queue.list("").jobs == [] and [*queue.files._folders()] == []


def test_a_database_that_cannot_grow_takes_jobs_again_once_it_can(queue):
    size = (queue.files.folder / "jobs.sqlite-wal").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot keep jobs"):
            queue.submit([WISH])
        assert queue.list("").jobs == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert queue.submit([WISH]) == queue.list("").jobs


@pytest.mark.parametrize("job_id, name", [("..", "a"), ("video_" + "0" * 32, "../a"), ("video_" + "0" * 32, "..")])
def test_no_path_is_taken_for_a_name(tmp_path, job_id, name):
    with pytest.raises(ValueError, match="is not an? (id|name)"):
        JobFiles(tmp_path).path(job_id, name)


def test_folders_of_no_job_are_swept_once_they_are_old(tmp_path, monkeypatch):
    files = JobFiles(tmp_path)
    kept, lost = new_id(), new_id()
    for one in (kept, lost):
        files.keep(one, {"a": b"123"})
    (tmp_path / "mine").mkdir()
    files.sweep(lambda one: one == kept)
    assert files.sizes() == {kept: 3, lost: 3}
    monkeypatch.setattr(job_files, "YOUNG_SECONDS", -1)
    files.sweep(lambda one: one == kept)
    assert files.sizes() == {kept: 3} and (tmp_path / "mine").is_dir()


def test_folders_may_go_while_they_are_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(job_files, "YOUNG_SECONDS", -1)
    files, lost = JobFiles(tmp_path), [new_id(), new_id(), new_id()]
    for one in lost:
        files.keep(one, {"a": b"123"})
    files.sweep(lambda _: [files.delete(one) for one in lost])
    assert files.sizes() == {}


def made(queue: Queue, number: int, content: bytes = b"12345") -> list[str]:
    for _ in range(number):
        [job] = queue.submit([WISH])
        queue.claim()
        queue.finish(job.id, replace(MADE, files={"video.mp4": content}))
    return [one.id for one in queue.list("", newest_first=False).jobs]


def test_a_job_that_has_expired_goes_with_its_files(queue, monkeypatch):
    gone, stays = made(queue, 1)[0], made(replace(queue, keep_seconds=3600), 1)[1]
    tidy(queue)
    assert queue.get(gone, "")
    monkeypatch.setattr(keeping, "time", lambda: time.time() + 61)
    tidy(queue)
    assert queue.get(gone, "") is None and queue.get(stays, "") and [*queue.files.sizes()] == [stays]


def test_the_first_that_ended_go_where_files_hold_too_much(queue):
    jobs = made(queue, 3)
    [waiting] = queue.submit([WISH], {"image.png": b"12345"})
    tidy(queue, 20)
    assert len(queue.list("").jobs) == 4
    tidy(queue, 14)
    assert [one.id for one in queue.list("").jobs] == [waiting.id, jobs[2]]
    tidy(queue, 0)
    assert queue.list("").jobs == [waiting]


def test_tidying_goes_on_after_an_error(queue, monkeypatch, caplog):
    monkeypatch.setattr(keeping, "EVERY", 0.01)
    [job] = made(queue, 1)
    with keeping.kept_tidy(queue, 5), monkeypatch.context() as broken:
        broken.setattr(Queue, "remove", lambda *_: 1 / 0)
        made(queue, 1)
        until(lambda: "ZeroDivisionError" in caplog.text)
        broken.undo()
        until(lambda: queue.get(job, "") is None)


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)
