"""What was made, and clients that wait for it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from wan.serve.api.errors import ApiError, not_found
from wan.serve.api.routes_videos import takes
from wan.serve.api.schema import MB, VideoDeleted, VideoRequest, inference_seconds, video_object
from wan.serve.api.service import Asks, Client, Served, Service
from wan.serve.jobs.files import MEDIA_TYPES
from wan.serve.jobs.job import Job, Status

# How often a job is looked at of which a client wants news, or the video, which is late by half of it in the mean; and
# how long nothing may be said to a client.
LOOK_SECONDS, END_LOOK_SECONDS, QUIET_SECONDS = 0.25, 0.1, 15.0
# Of a job that failed, by its code; others are the server's own.
STATUSES = {"invalid_request": 400, "out_of_memory": 507}


router = APIRouter(prefix="/v1/videos", tags=["videos"])


@router.get("/{video_id}/content", response_class=FileResponse)
async def content(
    video_id: str, client: Asks, service: Served, variant: Literal["video", "thumbnail", "spritesheet"] = "video"
) -> FileResponse:
    """The video, or a picture of it. A video of one frame is a PNG."""
    job = await service.job(video_id, client)
    if job.status is not Status.COMPLETED:
        what = f"is {job.status}; its content comes once it is completed"
        raise ApiError(404, f"video {video_id} {what}", "video_not_ready")
    return _file(service, job, variant)


@router.get("/{video_id}/events", response_class=StreamingResponse)
async def events(video_id: str, client: Asks, service: Served) -> StreamingResponse:
    """The video object whenever it has changed, as server-sent events, until the video is made or failed."""
    await service.job(video_id, client)
    # Before the answer begins, which has a status.
    service.check_listeners()
    return StreamingResponse(_news(service, video_id, client), media_type="text/event-stream")


@router.post("/sync", response_class=FileResponse, openapi_extra=takes(VideoRequest))
async def sync(request: Request, client: Asks, service: Served) -> FileResponse:
    """Make a video and send it. A client that goes away takes its job with it."""
    service.check_listeners()
    with service.listener():
        [job] = await service.submit(request, client, is_one=True)
        job = await _ended(service, job, client, request)
    if job.error is not None:
        raise ApiError(STATUSES.get(job.error.code, 500), job.error.message, job.error.code)
    headers = {
        "X-Request-Id": job.id,
        "X-Model": job.wish.model,
        "X-Inference-Time-S": f"{inference_seconds(job):.3f}",
        "X-Stage-Durations": json.dumps({name: round(seconds, 3) for name, seconds in job.seconds.items()}),
        "X-Peak-Memory-MB": f"{(job.peak_bytes or 0) / MB:.1f}",
    }
    return _file(service, job, "video", headers)


def _file(service: Service, job: Job, variant: str, headers: dict[str, str] | None = None) -> FileResponse:
    """The answer with a file of a completed job; raises `ApiError` for one that is gone."""
    name = next((name for name in job.files if name in [f"{variant}{ending}" for ending in MEDIA_TYPES]), None)
    if name is None or not (path := service.queue.files.path(job.id, name)).is_file():
        raise not_found(job.id) if name else ApiError(404, f"video {job.id} has no {variant}", "no_variant", "variant")
    shown = f"{job.id}{path.suffix}" if variant == "video" else f"{job.id}-{variant}{path.suffix}"
    return FileResponse(path, media_type=MEDIA_TYPES[path.suffix], filename=shown, headers=headers)


async def _ended(service: Service, job: Job, client: Client, request: Request) -> Job:
    """A job once it has ended; deletes it if the client has gone. Raises `ApiError` if someone deleted it."""
    while not job.status.has_ended:
        if await request.is_disconnected():
            await run_in_threadpool(service.queue.delete, job.id, client.owner)
            raise not_found(job.id)
        await asyncio.sleep(END_LOOK_SECONDS)
        job = await service.job(job.id, client)
    return job


async def _news(service: Service, job_id: str, client: Client) -> AsyncIterator[str]:
    last, quiet = "", 0.0
    with service.listener():
        while (job := await run_in_threadpool(service.queue.get, job_id, client.owner)) is not None:
            is_waiting = job.status is Status.QUEUED
            ahead = await run_in_threadpool(service.queue.store.ahead, job_id) if is_waiting else None
            text = video_object(job, ahead).model_dump_json()
            if text != last:
                yield _event(f"video.{job.status}", text)
                last, quiet = text, 0.0
            elif quiet >= QUIET_SECONDS:
                # A comment, which keeps what lies between from ending a connection that says nothing.
                yield ": still here\n\n"
                quiet = 0.0
            if job.status.has_ended:
                return
            await asyncio.sleep(LOOK_SECONDS)
            quiet += LOOK_SECONDS
    yield _event("video.deleted", VideoDeleted(id=job_id).model_dump_json())


def _event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"
