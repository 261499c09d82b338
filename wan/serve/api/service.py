"""What the routes share: the queue, what is offered, and what may be asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from nabla import InputError
from wan.files.picture import check_content
from wan.serve.api.access import Tokens, source_of
from wan.serve.api.bodies import PICTURES, read_body
from wan.serve.api.errors import ApiError, not_found
from wan.serve.api.metrics import Metrics
from wan.serve.api.models import Model, Models
from wan.serve.api.schema import VideoRequest
from wan.serve.api.wishes import Layer, check_pictures, counted_up, settle
from wan.serve.jobs.job import Job, Wish
from wan.serve.jobs.queue import Queue
from wan.serve.limits import Limits
from wan.serve.lora_library import LoraLibrary

# Names of files by Pillow's name of their format. MPO is a JPEG of a camera.
ENDINGS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}
# Clients that have a connection open until their video is made, each of which has its job looked at.
MOST_LISTENING = 200
KEY_CHARACTERS = 255


class Client(NamedTuple):
    """Who asks. owner: whose jobs are seen; source: whose are counted together; key: of a request that is repeated"""

    owner: str
    source: str
    key: str | None


async def client_of(request: Request) -> Client:
    owner: str = request.state.owner
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= KEY_CHARACTERS:
        raise ApiError(400, f"Idempotency-Key has 1 to {KEY_CHARACTERS} characters", "invalid_value")
    return Client(owner, source_of(owner, request.client.host if request.client else None), key)


@dataclass
class Service:
    """What the server is made of. is_alive: whether jobs are being given out"""

    queue: Queue
    models: Models
    limits: Limits
    tokens: Tokens
    metrics: Metrics
    library: LoraLibrary | None = None
    is_alive: Callable[[], bool] = lambda: True
    started: int = field(default_factory=lambda: int(time.time()))
    # Pictures are decoded one at a time, since each may take many times its own bytes.
    _decoding: asyncio.Lock = field(default_factory=asyncio.Lock)
    _listening: int = 0

    async def submit(self, request: Request, client: Client, is_one: bool = False) -> list[Job]:
        """The jobs of a request for videos, which wait once this returns. is_one: where no more than one may be.

        Raises `ApiError`, `InputError`, `QueueFull`, `StorageError` and pydantic's `ValidationError`.
        """
        body = await read_body(request)
        asked, pictures = VideoRequest.model_validate(body.fields), body.pictures
        if is_one and asked.n > 1:
            raise InputError("n is 1 where one video is sent back")
        model = self.models[asked.model]
        check_pictures(model, pictures)
        async with self._decoding:
            files = await run_in_threadpool(self._named, pictures)
        layers = await run_in_threadpool(self._settled, asked, model)
        inputs = {setting: name for setting, (name, _) in files.items()}
        more = {"asked": body.digest(request.url.path), "priority": asked.priority}
        return await self.add(layers, model.name, inputs, dict(files.values()), client, **more)

    async def add(
        self,
        layers: list[Layer],
        model: str,
        inputs: Mapping[str, str],
        uploads: Mapping[str, bytes],
        client: Client,
        **more: Any,
    ) -> list[Job]:
        """Put jobs in the queue; those of a repeated request are given as they are. Raises `ApiError` if it differs."""
        common = {"owner": client.owner, "source": client.source, "key": client.key, **more}
        wishes = [Wish(model, layer, inputs, **common) for layer in layers]
        jobs = await run_in_threadpool(self.queue.submit, wishes, uploads)
        if jobs[0].wish.asked != wishes[0].asked:
            raise ApiError(409, "this Idempotency-Key was another request's; use a new one", "idempotency_key_reused")
        return jobs

    async def job(self, job_id: str, client: Client) -> Job:
        """A client's job. Raises `ApiError`, 404, for one that is not there, or is another's."""
        job = await run_in_threadpool(self.queue.get, job_id, client.owner)
        if job is None:
            raise not_found(job_id)
        return job

    def check_listeners(self) -> None:
        """Raise `ApiError`, 429, if no further client may wait here for its video."""
        if self._listening >= MOST_LISTENING:
            wait = {"Retry-After": "10"}
            raise ApiError(429, f"{MOST_LISTENING} clients wait for videos; ask again, or poll", "busy", None, wait)

    @contextmanager
    def listener(self) -> Iterator[None]:
        """One more client waits for its video."""
        self._listening += 1
        try:
            yield
        finally:
            self._listening -= 1

    def _settled(self, asked: VideoRequest, model: Model) -> list[Layer]:
        library = {} if self.library is None else self.library.files()
        return counted_up(settle(model, asked, self.limits, library), asked.n)

    def _named(self, pictures: Mapping[str, bytes]) -> dict[str, tuple[str, bytes]]:
        """Names, of which none is the client's, and contents by setting; raises `InputError` for what is no picture."""
        most, fields = self.limits.picture_pixels, {setting: field for field, setting in PICTURES.items()}
        files = {}
        for setting, content in pictures.items():
            if not content:
                raise InputError(f"{fields[setting]} is empty; send a picture")
            ending = ENDINGS[check_content(content, fields[setting], most)]
            files[setting] = (f"{setting}.{ending}", content)
        return files


async def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


# What routes take: who asks, and what serves.
Asks = Annotated[Client, Depends(client_of)]
Served = Annotated[Service, Depends(service_of)]
