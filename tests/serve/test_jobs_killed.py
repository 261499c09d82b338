"""Jobs that processes write until they are killed: what was answered is there, whole."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

from wan.serve.jobs.job import Status, Wish
from wan.serve.jobs.queue import Queue
from wan.serve.workers.messages import Made

# Without what torch takes to import.
processes = multiprocessing.get_context("fork")
ROUNDS = 8
VIDEO = os.urandom(100_000)


def ask(folder: Path, answers: Connection) -> None:
    """Send the id of each job once it is taken in, and of each third job once it is gone."""
    queue = Queue.open(folder)
    while True:
        [job] = queue.submit([Wish("a", {"prompt": "A cat"})], {"image.png": VIDEO})
        answers.send(("asked", job.id))
        if random.random() < 0.3:
            queue.delete(job.id, "")
            answers.send(("deleted", job.id))


def make(folder: Path, answers: Connection) -> None:
    """Send the id of each job once it is completed."""
    queue = Queue.open(folder)
    while True:
        if job := queue.claim():
            if queue.finish(job.id, Made({"video.mp4": VIDEO}, {}, {}, None, None)):
                answers.send(("made", job.id))


def answered(connection: Connection) -> list[tuple[str, str]]:
    """All that was sent by a process that is dead."""
    answers = []
    try:
        while connection.poll():
            answers.append(connection.recv())
    except EOFError:
        pass
    return answers


def test_what_was_answered_outlives_processes_that_are_killed(tmp_path):
    random.seed(0)
    answers: list[tuple[str, str]] = []
    for _ in range(ROUNDS):
        begun = []
        for work in (ask, make):
            ours, theirs = processes.Pipe()
            process = processes.Process(target=work, args=(tmp_path, theirs))
            process.start()
            begun.append((process, ours))
        time.sleep(0.05 + 0.1 * random.random())
        for process, connection in begun:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            answers += answered(connection)
        queue = Queue.open(tmp_path)
        assert queue.store.give_back_all() <= 1
    by_word = {word: {one for its, one in answers if its == word} for word in ("asked", "deleted", "made")}
    assert len(by_word["asked"]) > ROUNDS and len(by_word["made"]) > ROUNDS
    jobs = {one.id: one for one in queue.list("", limit=10_000).jobs}
    # One that was being deleted when its process was killed is gone, or as it was.
    lost = by_word["asked"] - by_word["deleted"] - jobs.keys()
    assert len(lost) <= ROUNDS and not by_word["deleted"] & jobs.keys()
    assert all(jobs[one].status is Status.COMPLETED for one in by_word["made"] & jobs.keys())
    for one in jobs.values():
        name = "video.mp4" if one.status is Status.COMPLETED else "image.png"
        assert queue.files.read(one.id, name) == VIDEO
    with queue.store._connected() as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
