"""What the page says: progress, results and errors as HTML, with all that came from elsewhere escaped and
the server's folders left out."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from wan.serve.shown import without_folders
from wan.serve.studio import DECODING, LOADING, READING, SAMPLING, WAITING, JobProgress, JobResult

STARTING, READY = '<div class="status">Starting</div>', '<div class="status">Ready</div>'

# What a video that was cancelled waits for; no more than the end of a written file where nothing is said.
STOPPING = {
    WAITING: "Stopping",
    LOADING: "Stopping once the model is loaded",
    READING: "Stopping once the prompt is read",
    SAMPLING: "Stopping after this step",
    DECODING: "Stopping once this is decoded",
}


def progress_html(progress: JobProgress) -> str:
    share = progress.step / progress.steps if progress.steps else 0.0
    bar = (
        f'<div class="bar" role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{100 * share:.0f}">'
        f'<div style="width: {share:.1%}"></div></div>'
    )
    return f'<div class="status busy">{escape(progress_line(progress))}</div>{bar}' + notes_html(progress.notes)


def progress_line(progress: JobProgress) -> str:
    """One line of where a video is."""
    if progress.stopping and progress.stage in STOPPING:
        return STOPPING[progress.stage]
    if progress.stage == WAITING and progress.ahead:
        return f"Waiting for {progress.ahead} video{'s' if progress.ahead > 1 else ''} before yours"
    if progress.stage != SAMPLING:
        return progress.stage
    left = "" if progress.seconds_left is None else f", {duration(progress.seconds_left)} left"
    return f"Step {progress.step} of {progress.steps}{left}"


def made_html(made: JobResult, notes: Sequence[str]) -> str:
    settings = made.settings
    size, walk = "x".join(map(str, settings.video.size)), settings.sampling
    what = f"{size}, {settings.video.frame_num} frames, {walk.steps} steps, {settings.attention.algorithm}"
    line = f"Made in {duration(made.seconds)}: {what}, seed {walk.seed}"
    return f'<div class="status done">{escape(line)}</div>' + notes_html(notes)


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
