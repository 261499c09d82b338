"""What happens on the page with jobs: one is asked for, looked at, cancelled or deleted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gradio as gr

from nabla import InputError
from wan.config.settings import Settings
from wan.serve.jobs.store import QueueFull, StorageError
from wan.serve.limits import Limits, Visitor
from wan.serve.page.layout import ROWS, Controls
from wan.serve.page.status import READY, job_html, list_html, result_html, said_html
from wan.serve.page.visible import VisibleJobs
from wan.serve.page.visits import Visits
from wan.serve.page.wishes import to_wish
from wan.serve.presets import OWN
from wan.serve.shown import name_of

# New values or looks of controls, by control.
Updates = dict[Any, Any]
# Private: gradio's public API would offer the events to programs, with documentation.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
# How often an open page looks at its jobs: while one of them goes on, and else.
BUSY_SECONDS, IDLE_SECONDS = 0.5, 3.0
MOST_ROWS = 200


# A mark of each part of a `View`: the parts themselves would fill the memory that is kept for each session.
Seen = tuple[int, ...] | None


class View(NamedTuple):
    """What a browser shows of jobs, of which it is sent what is new to it. cancel: what the button says"""

    said: str
    result: str
    listed: str
    is_busy: bool
    cancel: str


class JobEvents:
    """The page's events of jobs. `wire` puts them on the controls.

    layer_of: gives settings in the schema of the YAML files, of those the form is made of and what its controls hold
    """

    def __init__(
        self,
        jobs: VisibleJobs,
        limits: Limits,
        controls: Controls,
        layer_of: Callable[[Settings, Sequence[Any]], Mapping[str, Any]],
    ):
        self.jobs = jobs
        self.visits = Visits(jobs.queue)
        self.limits = limits
        self.controls = controls
        self.layer_of = layer_of

    def wire(self, page: gr.Blocks) -> None:
        """Put the events on the controls of an open page."""
        c = self.controls
        looked_at, looks = [c.shown, c.rows, c.seen], [c.said, c.result, c.listed, c.cancel, c.timer, c.seen]
        gr.on(
            [c.generate.click, c.form["prompt"].submit],
            self.generate,
            [c.rows, c.seen, c.base, c.chosen, *c.values],
            [c.told, c.shown, *looks],
            # Gradio runs one call of an event at a time by default; nobody has to wait for another's upload here.
            concurrency_limit=None,
            trigger_mode="once",
            **QUIET,
        )
        # All past gradio's queue, lest it wait there behind what takes longer.
        page.load(self.look, looked_at, looks, queue=False, **QUIET)
        c.timer.tick(self.look, looked_at, looks, queue=False, trigger_mode="once", **QUIET)
        c.cancel.click(self.cancel, [c.rows, c.seen], [c.told, c.shown, *looks], queue=False, **QUIET)
        c.listed.click(self.use, looked_at, [c.told, c.shown, c.rows, *looks], queue=False, **QUIET)

    def generate(
        self, request: gr.Request, rows: int, seen: Seen, base: Settings, chosen: str | None, *values: Any
    ) -> Updates:
        """Ask for the video of the controls, and show how far it is from now on."""
        c, visitor = self.controls, visitor_of(request)
        model = name_of(base.checkpoint) if chosen in (None, OWN) else chosen
        try:
            wish, uploads = to_wish(self.layer_of(base, values), str(model), visitor, self.limits)
            job = self.visits.submit(visitor, wish, uploads)
        except (InputError, QueueFull, StorageError) as error:
            return {c.told: said_html(str(error), "wrong")}
        return {c.told: "", c.shown: job.id} | self._changes(visitor, job.id, rows, seen)

    def look(self, request: gr.Request, shown: str | None, rows: int, seen: Seen) -> Updates:
        """What is new of the job that is shown, and of the list."""
        return self._changes(visitor_of(request), shown, rows, seen)

    def cancel(self, request: gr.Request, rows: int | None, seen: Seen) -> Updates:
        """End all jobs of this session that have not ended."""
        c, visitor = self.controls, visitor_of(request)
        self.visits.cancel(visitor)
        return {c.told: said_html("Cancelled"), c.shown: None} | self._changes(visitor, None, rows, seen)

    def use(self, request: gr.Request, shown: str | None, rows: int, seen: Seen, event: gr.EventData) -> Updates:
        """What was clicked in the list: a video that shall be shown or deleted, or older ones."""
        c, visitor = self.controls, visitor_of(request)
        # Whoever asks by a raw call says what he likes.
        given = event._data if isinstance(event._data, Mapping) else {}
        does, job_id = given.get("does"), str(given.get("job"))
        if does == "more":
            rows = min(rows + ROWS, MOST_ROWS)
        elif does == "open" and self.jobs.get(job_id, visitor):
            shown = job_id
        elif does == "delete":
            self.jobs.delete(job_id, visitor)
            shown = None if shown == job_id else shown
        return {c.told: "", c.shown: shown, c.rows: rows} | self._changes(visitor, shown, rows, seen)

    def _changes(self, visitor: Visitor, shown: str | None, rows: int, seen: Seen) -> Updates:
        c, now = self.controls, self._view(visitor, shown, rows)
        shows: list[Updates] = [
            {c.said: now.said},
            {c.result: now.result},
            {c.listed: now.listed},
            {c.timer: gr.Timer(BUSY_SECONDS if now.is_busy else IDLE_SECONDS)},
            {c.cancel: gr.update(value=now.cancel, visible=bool(now.cancel))},
        ]
        marks = tuple(map(hash, now))
        updates: Updates = {c.seen: marks}
        for update, mark, before in zip(shows, marks, seen or [None] * len(now)):
            if mark != before:
                updates |= update
        return updates

    def _view(self, visitor: Visitor, shown: str | None, rows: int) -> View:
        job = None if shown is None else self.jobs.get(shown, visitor)
        listed, has_more = self.jobs.list(visitor, rows)
        # The one that is shown may be older than all that are listed.
        going = [one for one in (*listed, *filter(None, [job])) if not one.status.has_ended]
        previews = {one.id: time for one in going if (time := self.jobs.preview_time(one)) is not None}
        if job is None:
            said = READY if shown is None else said_html("This video is no longer there")
        else:
            said = job_html(job, self.jobs.queue.store.ahead(job.id))
        return View(
            said,
            result_html(job, None if job is None else previews.get(job.id)),
            list_html(listed, has_more and rows < MOST_ROWS, shown, previews),
            bool(going),
            _cancel([one.id for one in self.visits.going(visitor)], shown),
        )


def _cancel(going: Sequence[str], shown: str | None) -> str:
    """What the button says that ends a session's jobs, of which another may be shown."""
    if len(going) == 1:
        return "Cancel" if shown in going else "Cancel mine"
    return f"Cancel all {len(going)} of mine" if going else ""


def visitor_of(request: gr.Request) -> Visitor:
    return Visitor.at(request.client.host if request.client else None, request.session_hash)
