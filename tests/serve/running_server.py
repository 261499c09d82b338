"""Servers as processes that can be killed and started again, and what asks them as clients do."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from places import ROOT
from served_api import MP4, SHEET, THUMBNAIL, serve

from wan.serve.workers.dispatcher import Dispatcher
from wan.serve.workers.messages import SAMPLING, Event, Made, Order, Progress

# What serve.py may take to import torch and open its models, on a busy machine.
START_SECONDS = 180


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """A server of a folder; leave it as a context to end it. begin: starts its process, and gives that and the port"""

    def __init__(self, begin: Callable[[], tuple[int, int]]):
        self.begin = begin
        self.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(signal.SIGKILL)

    def start(self) -> None:
        self.pid, self.port = self.begin()

    def end(self, number: int) -> None:
        """Send it a signal, and see that the processes that it began are gone soon too."""
        others = children(self.pid)
        os.kill(self.pid, number)
        os.waitpid(self.pid, 0)
        # One that still imports torch ends once it has.
        until = time.monotonic() + 60
        while alive := [one for one in others if Path(f"/proc/{one}").exists()]:
            assert time.monotonic() < until, f"processes {alive} outlive their server"
            time.sleep(0.05)

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> Answer:
        """What is answered, whatever the status. Raises `OSError` and `HTTPException` if nothing is."""
        data = None if body is None else json.dumps(body).encode()
        headers |= {"Content-Type": "application/json"} if data else {}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Answer(answer.status, dict(answer.headers), answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, dict(error.headers), error.read())

    def memory(self) -> float:
        """MB that its process holds."""
        fields = Path(f"/proc/{self.pid}/status").read_text().split()
        return int(fields[fields.index("VmRSS:") + 1]) / 1024


def children(pid: int) -> list[int]:
    """The processes that a process has begun, and those of these."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found


def serve_program(folder: Path, *flags: object) -> tuple[int, int]:
    """Start serve.py, its output in a file beside its folder; its process and port once it answers."""
    log = folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    command = [sys.executable, ROOT / "serve.py", "--port", 0, "--save_dir", folder, *flags]
    with log.open("w") as output:
        # Several threads of a process each, on few cores, wait for one another far longer than they compute.
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        pid = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=output, stderr=output, env=env).pid
    until = time.monotonic() + START_SECONDS
    while "server: http://127.0.0.1:" not in log.read_text():
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)
    return pid, int(re.search(r"http://127.0.0.1:(\d+)/", log.read_text())[1])


class InstantReplica:
    """Makes videos in no time."""

    def start(self, order: Order) -> None:
        files = {"video.mp4": MP4, "thumbnail.webp": THUMBNAIL, "spritesheet.webp": SHEET}
        self.events: list[Event] = [Progress(SAMPLING, 1, 2), Made(files, order.layer, {"sampling": 0.1}, None, None)]

    def poll(self, seconds: float) -> Event | None:
        return self.events.pop(0) if self.events else None

    def abort(self) -> None: ...

    def close(self) -> None: ...


class InstantEngine:
    def start_replica(self) -> InstantReplica:
        return InstantReplica()

    def wanted(self, waiting: int, running: int) -> int:
        return 1

    def close(self) -> None: ...


def serve_forked(folder: Path, checkpoint: Path) -> tuple[int, int]:
    """Fork a server whose videos are made in no time, which spares imports and the model."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(folder, checkpoint, theirs))
    process.start()
    return process.pid, ours.recv()


def _serve(folder: Path, checkpoint: Path, answer: Connection) -> None:
    with serve(folder, checkpoint) as served, Dispatcher(served.service.queue, InstantEngine()):
        answer.send(served.port)
        threading.Event().wait()
