"""The files of jobs as browsers fetch them."""

from __future__ import annotations

import re
from collections.abc import Callable

from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, PlainTextResponse, Response

from wan.files.plain_data import read_json
from wan.serve.jobs.files import MEDIA_TYPES
from wan.serve.jobs.job import Job, Status
from wan.serve.jobs.queue import PREVIEW
from wan.serve.limits import Visitor
from wan.serve.page.visible import VisibleJobs
from wan.serve.shown import sidecar_to_share

ROUTE = re.compile(r"/jobs/(video_[0-9a-f]{32})/(video|settings|thumbnail|preview)")
# Of a job that is made, by what is asked for; and of what a browser takes it for.
MADE = {"video": ("video.mp4", "video.png"), "thumbnail": ("thumbnail.webp",), "settings": ("video.json",)}
# A cache that several visitors share, as a proxy's, would give one what another sees.
OWN = {"cache-control": "private"}


class JobFilesApp:
    """An ASGI application that answers for files of jobs that a visitor sees, and leaves all else to another.

    Nothing is read by a path that is asked for: an id finds a job, and a word one of its files.
    """

    def __init__(self, app: Callable, jobs: VisibleJobs):
        self.app, self.jobs = app, jobs

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        found = ROUTE.fullmatch(scope["path"]) if scope["type"] == "http" else None
        if found is None:
            await self.app(scope, receive, send)
            return
        visitor = Visitor.at((scope.get("client") or ("",))[0], None)
        answer = PlainTextResponse("there is nothing here\n", 404)
        if scope["method"] in ("GET", "HEAD"):
            answer = await run_in_threadpool(self._answer, *found.groups(), visitor) or answer
        await answer(scope, receive, send)

    def _answer(self, job_id: str, what: str, visitor: Visitor) -> Response | None:
        job = self.jobs.get(job_id, visitor)
        if job is None:
            return None
        try:
            return self._preview(job) if what == "preview" else self._made(job, what)
        except FileNotFoundError:
            # Deleted, or made, since it was looked up.
            return None

    def _preview(self, job: Job) -> Response:
        return Response(self.jobs.queue.files.read(job.id, PREVIEW), media_type="image/jpeg", headers=OWN)

    def _made(self, job: Job, what: str) -> Response | None:
        names = [name for name in MADE[what] if name in job.files]
        if job.status is not Status.COMPLETED or not names:
            return None
        path = self.jobs.queue.files.path(job.id, names[0])
        if what == "settings":
            return Response(sidecar_to_share(read_json(path)), media_type="application/json", headers=OWN)
        # Looked at here, so that one that is gone is answered like any other.
        return FileResponse(path, media_type=MEDIA_TYPES[path.suffix], headers=OWN, stat_result=path.stat())
