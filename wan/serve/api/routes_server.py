"""What the server says of itself."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from wan.serve.api.schema import ModelList, ModelObject
from wan.serve.api.service import Served, Service
from wan.serve.jobs.store import StorageError

router = APIRouter(tags=["server"])


def _described(service: Service, name: str) -> ModelObject:
    model = service.models[name]
    takes = "image" in model.inputs.taken
    what = f"{model.checkpoint.family.name}, {model.checkpoint.kind or 'text to video'}"
    return ModelObject(id=name, created=service.started, owned_by="server", description=what, input_reference=takes)


@router.get("/v1/models")
async def list_models(service: Served) -> ModelList:
    """The models that videos can be made with; the first is taken where a request names none."""
    return ModelList(data=[_described(service, name) for name in service.models.by_name])


@router.get("/v1/models/{model}")
async def retrieve_model(model: str, service: Served) -> ModelObject:
    return _described(service, model)


@router.get("/health")
async def health(service: Served) -> Any:
    """Whether jobs are taken and given out. Needs no token."""
    try:
        await run_in_threadpool(service.queue.store.count)
        is_well = service.is_alive()
    except StorageError:
        is_well = False
    return JSONResponse({"status": "ok" if is_well else "failing"}, 200 if is_well else 503)


@router.get("/metrics")
async def metrics(service: Served) -> Response:
    """For Prometheus."""
    return Response(await run_in_threadpool(service.metrics.text), media_type="text/plain; version=0.0.4")
