"""What the page says: progress, results, errors and the list of videos as HTML, with all that came from elsewhere
escaped and the server's folders left out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape

from wan.config.settings import Settings, resolve
from wan.run.jobs import words_of
from wan.serve.jobs.job import Job, Status
from wan.serve.shown import without_folders
from wan.serve.workers.messages import DECODING, LOADING, READING, SAMPLING, WRITING

STARTING, READY = '<div class="status">Starting</div>', '<div class="status">Ready</div>'
NOTHING = '<div class="empty">Videos play here</div>'
STAGES = {
    "": "Starting",
    LOADING: "Loading the model",
    READING: "Reading the prompt",
    SAMPLING: "Sampling",
    DECODING: "Decoding",
    WRITING: "Writing",
}
# Of a prompt, in the list.
MOST_CHARACTERS = 200


def job_html(job: Job, ahead: int = 0) -> str:
    """How far a job is, or what it came to. ahead: jobs before one that waits"""
    notes = notes_html(job.notes)
    if job.status is Status.FAILED:
        return said_html(error_line(job), "wrong") + notes
    if job.status is Status.COMPLETED:
        return said_html(made_line(job), "done") + notes
    return f'<div class="status busy">{escape(progress_line(job, ahead))}</div>{bar_html(job)}{notes}'


def bar_html(job: Job) -> str:
    share = job.step / job.steps if job.steps else 0.0
    return (
        f'<div class="bar" role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{100 * share:.0f}">'
        f'<div style="width: {share:.1%}"></div></div>'
    )


def progress_line(job: Job, ahead: int = 0) -> str:
    """One line of where a job is that has not ended."""
    if job.status is Status.QUEUED:
        return f"Waiting for {ahead} video{'s' if ahead > 1 else ''} before it" if ahead else "Waiting"
    if job.stage != SAMPLING:
        return STAGES[job.stage]
    left = "" if job.seconds_left is None else f", {duration(job.seconds_left)} left"
    return f"Step {job.step} of {job.steps}{left}"


def made_line(job: Job) -> str:
    settings = settings_of(job)
    size, walk = "x".join(map(str, settings.video.size)), settings.sampling
    what = f"{size}, {settings.video.frame_num} frames, {walk.steps} steps, {settings.attention.algorithm}"
    return f"Made in {duration(seconds_of(job))}: {what}, seed {walk.seed}"


def error_line(job: Job) -> str:
    return "it failed" if job.error is None else job.error.message


def result_html(job: Job | None, preview: int | None = None) -> str:
    """What there is to be seen of a job, and to be saved. preview: as of `VisibleJobs.preview_time`"""
    if job is None:
        return NOTHING
    if job.status is not Status.COMPLETED:
        return NOTHING if preview is None else f'<img id="picture" alt="" src="{_preview(job, preview)}">'
    files, name = f"jobs/{job.id}", f"{words_of(_prompt(job))}-{job.id[-8:]}"
    is_video = "video.mp4" in job.files
    # Browsers play by themselves only what is muted.
    player = f'<video id="video" src="{files}/video" controls autoplay loop muted playsinline></video>'
    shown = player if is_video else f'<img id="video" alt="" src="{files}/video">'
    kind, ending = ("video", "mp4") if is_video else ("picture", "png")
    return (
        f'{shown}<div class="saves"><a id="save-video" href="{files}/video" download="{escape(name)}.{ending}">Save '
        f'{kind}</a><a id="save-record" href="{files}/settings" download="{escape(name)}.json">Save settings</a></div>'
    )


def list_html(jobs: Sequence[Job], has_more: bool, shown: str | None, previews: Mapping[str, int]) -> str:
    """The videos of a list. shown: the id of the one that is played; previews: times of those of jobs, by id"""
    if not jobs:
        return '<div class="about">No videos yet</div>'
    rows = "".join(_row(job, job.id == shown, previews.get(job.id)) for job in jobs)
    more = '<button data-does="more" class="older">Older ones</button>' if has_more else ""
    return f'<ul class="jobs">{rows}</ul>{more}'


def _row(job: Job, is_shown: bool, preview: int | None) -> str:
    source = f"jobs/{job.id}/thumbnail" if job.status is Status.COMPLETED else None
    if preview is not None:
        source = _preview(job, preview)
    picture = "<span></span>" if source is None else f'<img alt="" loading="lazy" src="{source}">'
    came = time.strftime("%d %b %H:%M", time.localtime(job.created_at))
    via = "API" if job.wish.via == "api" else job.wish.via
    about = " &middot; ".join(map(escape, (_line(job), job.wish.model, came, via)))
    prompt = escape(_prompt(job)[:MOST_CHARACTERS])
    ends = "Delete" if job.status.has_ended else "Cancel"
    return (
        f'<li data-job="{job.id}" class="{job.status}{" shown" if is_shown else ""}"><button data-does="open">{picture}'
        f'<span class="prompt">{prompt}</span><span class="about">{about}</span></button>'
        f'<button data-does="delete" title="{ends}" aria-label="{ends}">&#10005;</button></li>'
    )


def _line(job: Job) -> str:
    if job.status is Status.COMPLETED:
        return f"Made in {duration(seconds_of(job))}"
    return f"Failed: {without_folders(error_line(job))}" if job.status is Status.FAILED else progress_line(job)


def _preview(job: Job, preview: int) -> str:
    return f"jobs/{job.id}/preview?{preview}"


def _prompt(job: Job) -> str:
    return str(job.wish.layer.get("prompt") or "")


def settings_of(job: Job) -> Settings:
    """Those that a job was made with, without its prompt and the files of its client."""
    return resolve(job.settings or {}, needs_prompt=False)


def seconds_of(job: Job) -> float:
    """How long the making of a job took, or that which made it in the end."""
    return (job.completed_at or 0.0) - (job.started_at or 0.0)


def said_html(text: str, kind: str = "") -> str:
    """A message; `kind` is "", "done" or "wrong"."""
    role = "alert" if kind == "wrong" else "status"
    # Folders go first: once they are escaped, quotes and brackets would not end a path.
    return f'<div class="status {kind}" role="{role}">{escape(without_folders(text))}</div>'


def notes_html(notes: Sequence[str]) -> str:
    return "".join(f'<div class="note">{escape(without_folders(note))}</div>' for note in notes)


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
