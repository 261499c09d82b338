"""The API served over HTTP on a port of its own, with nobody who makes the videos but the test."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openai import OpenAI

from wan.config.settings import Settings
from wan.models.family import MediaInputs
from wan.serve.api.access import Tokens
from wan.serve.api.bounds import BODY_SECONDS
from wan.serve.api.metrics import MeasuredQueue, Metrics
from wan.serve.api.models import Model, Models
from wan.serve.api.server import listen, make_app, make_server
from wan.serve.api.service import Service
from wan.serve.hosts import Hosts
from wan.serve.jobs.job import JobError
from wan.serve.jobs.store import QueueLimits
from wan.serve.limits import Limits
from wan.serve.lora_library import LoraLibrary
from wan.serve.workers.messages import SAMPLING, Made, Progress

MP4, THUMBNAIL, SHEET = b"a small video", b"its first frame", b"frames of it"
TINY = {"size": "32x32", "num_frames": 5, "num_inference_steps": 2}


@dataclass
class Served:
    """A server, and those who make its videos."""

    port: int
    service: Service

    def client(self, token: str = "no token is asked for", **options: Any) -> OpenAI:
        url = f"http://127.0.0.1:{self.port}/v1"
        return OpenAI(base_url=url, api_key=token, **{"max_retries": 0, "timeout": 20} | options)

    def begin(self) -> str:
        """Take the next job to make; its id."""
        job = self.service.queue.claim()
        assert job is not None
        return job.id

    def make(self, job_id: str | None = None) -> str:
        """Make the next job, or the one that was begun; its id."""
        queue, job_id = self.service.queue, job_id or self.begin()
        job = queue.store.get(job_id)
        assert job is not None
        files = {"video.mp4": MP4, "thumbnail.webp": THUMBNAIL, "spritesheet.webp": SHEET}
        queue.finish(job_id, Made(files, job.wish.layer, {"sampling": 1.5, "decode": 0.25}, 3 << 20, 0.25))
        return job_id

    def tell(self, job_id: str, step: int, steps: int) -> bool:
        return self.service.queue.tell(job_id, Progress(SAMPLING, step, steps, 1.0))

    def fail(self, code: str, message: str) -> str:
        job_id = self.begin()
        self.service.queue.fail(job_id, JobError(code, message))
        return job_id

    def raw(self, *parts: bytes, seconds: float = 10) -> bytes:
        """What comes back of bytes that are sent as they are."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            for part in parts:
                connection.sendall(part)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, Any]]:
        """Status and JSON of an answer; a header of an empty text is left out."""
        usual = {"Host": f"127.0.0.1:{self.port}", "Content-Length": str(len(body)), "Connection": "close"}
        given = usual | {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items() if value)]
        answer = self.raw("\r\n".join([*lines, "", ""]).encode() + body)
        head, _, content = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(content or b"{}")

    def create(self, body: dict[str, Any], **headers: str) -> tuple[int, dict[str, Any]]:
        content = json.dumps(TINY | {"prompt": "A red circle"} | body).encode()
        return self.ask("POST", "/v1/videos", content, Content_Type="application/json", **headers)


@contextmanager
def serve(
    folder: Path,
    checkpoint: Path,
    tokens: Tokens | None = None,
    limits: dict[str, int] | None = None,
    body_seconds: float = BODY_SECONDS,
) -> Iterator[Served]:
    """A server whose models are "nano" and "pictures", which begins videos with one."""
    model = Model.open(None, {"checkpoint": str(checkpoint)}, "none")
    takes = lambda *_: MediaInputs(frozenset({"image"}), frozenset({"last_image"}))  # noqa: E731
    family = replace(model.checkpoint.family, inputs_of=takes)
    pictures = replace(model, name="pictures", checkpoint=replace(model.checkpoint, family=family))
    most = Limits.of(limits or {}, [model.resolve({}, needs_prompt=False)])
    metrics = Metrics()
    counted = QueueLimits(most.waiting, most.waiting_of_source)
    queue = MeasuredQueue.open(folder, limits=counted, metrics=metrics)
    library = LoraLibrary(folder / "loras")
    service = Service(queue, Models([model, pictures]), most, tokens or Tokens(), metrics, library)
    listening = listen("127.0.0.1", 0)
    server = make_server(make_app(service, Hosts("127.0.0.1"), body_seconds))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield Served(listening.getsockname()[1], service)
    finally:
        server.should_exit = True
        thread.join()
        queue.close()


def settings_of(served: Served, job_id: str) -> Settings:
    """The settings that a job is to be made with."""
    job = served.service.queue.store.get(job_id)
    assert job is not None
    return served.service.models[job.wish.model].resolve(job.wish.layer)
