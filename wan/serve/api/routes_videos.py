"""Videos as jobs: asked for, looked at, made anew with another prompt, deleted."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool

from nabla import InputError
from wan.serve.api.bodies import PICTURES, read_body
from wan.serve.api.errors import ApiError, not_found
from wan.serve.api.schema import RemixRequest, VideoDeleted, VideoList, VideoObject, VideoRequest, video_object
from wan.serve.api.service import Asks, Served
from wan.serve.api.wishes import remixed
from wan.serve.jobs.job import Status


def takes(model: type[RemixRequest]) -> dict[str, Any]:
    """What the OpenAPI page says of a body that a route reads itself."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    files = {name: {"type": "string", "format": "binary"} for name in PICTURES} if model is VideoRequest else {}
    form = schema | {"properties": schema["properties"] | files}
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


router = APIRouter(prefix="/v1/videos", tags=["videos"])


@router.post("", openapi_extra=takes(VideoRequest))
async def create(request: Request, client: Asks, service: Served) -> VideoObject:
    """Ask for a video. Where `n` asks for several, `videos` has the ids of all."""
    jobs = await service.submit(request, client)
    ahead = await run_in_threadpool(service.queue.store.ahead, jobs[0].id)
    return video_object(jobs[0], ahead, [job.id for job in jobs] if len(jobs) > 1 else None)


@router.get("")
async def list_videos(
    client: Asks,
    service: Served,
    after: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    """Your videos, the newest first; `after` is the last id of the page before."""
    try:
        found = await run_in_threadpool(
            service.queue.list, client.owner, after=after, limit=limit, newest_first=order == "desc"
        )
    except KeyError:
        raise ApiError(400, f"after {after!r} is not one of your videos", "invalid_value", "after") from None
    data = [video_object(job) for job in found.jobs]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return VideoList(data=data, first_id=first, last_id=last, has_more=found.has_more)


@router.get("/{video_id}")
async def retrieve(video_id: str, client: Asks, service: Served) -> VideoObject:
    """A video as it is now."""
    job = await service.job(video_id, client)
    is_waiting = job.status is Status.QUEUED
    return video_object(job, await run_in_threadpool(service.queue.store.ahead, job.id) if is_waiting else None)


@router.delete("/{video_id}")
async def delete(video_id: str, client: Asks, service: Served) -> VideoDeleted:
    """End a video that is made, after the step that runs; remove one that is there, with its files."""
    if not await run_in_threadpool(service.queue.delete, video_id, client.owner):
        raise not_found(video_id)
    return VideoDeleted(id=video_id)


@router.post("/{video_id}/remix", openapi_extra=takes(RemixRequest))
async def remix(video_id: str, request: Request, client: Asks, service: Served) -> VideoObject:
    """The same settings, seed and pictures with another prompt."""
    body = await read_body(request)
    asked = RemixRequest.model_validate(body.fields)
    if body.pictures:
        raise InputError(f"{' and '.join(body.pictures)}: a remix has the pictures of its source; leave them out")
    source = await service.job(video_id, client)
    if source.status is not Status.COMPLETED:
        raise ApiError(400, f"video {video_id} is {source.status}; remix it once it is completed", "not_completed")
    layer, inputs = remixed(source, asked.prompt, service.limits), source.wish.inputs
    try:
        uploads = {name: await run_in_threadpool(service.queue.files.read, video_id, name) for name in inputs.values()}
    except FileNotFoundError:
        raise not_found(video_id) from None
    more = {"asked": body.digest(request.url.path), "remixed_from": video_id}
    jobs = await service.add([layer], source.wish.model, inputs, uploads, client, **more)
    return video_object(jobs[0])
