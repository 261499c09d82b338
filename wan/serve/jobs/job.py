"""A video that was asked for, from the asking to its end. Plain data, that a database keeps."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple


class Status(StrEnum):
    """Where a job is, by the words of OpenAI's videos API."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"

    @property
    def has_ended(self) -> bool:
        return self in (Status.COMPLETED, Status.FAILED)


class JobError(NamedTuple):
    """Why a job failed: a word for programs, and a line for people, which names no folder of the server."""

    code: str
    message: str


@dataclass(frozen=True)
class Wish:
    """What a client asks for.

    model: one of the names that the server offers
    layer: settings in the schema of the YAML files, complete and checked; it names no file of a client
    inputs: files that the client sent, by the name of their setting ("image"); they lie in the job's folder
    owner: who may see the job, a digest of a token; empty where there are no tokens
    source: whose jobs are counted together in the queue: a token's owner, or an address
    priority: higher ones are made first; of equals the first that came
    key: of two wishes of one owner with the same idempotency key, the second is the first
    asked: a digest of the request, which tells one that is repeated from another that has its key
    via: "api" or "page"
    """

    model: str
    layer: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    owner: str = ""
    source: str = ""
    priority: int = 0
    key: str | None = None
    asked: str = ""
    remixed_from: str | None = None
    via: str = "api"


@dataclass(frozen=True)
class Job:
    """A wish and what has become of it. Times are seconds since 1970.

    stage: what is done now, of `wan.serve.workers.messages`; step, steps: of sampling
    seconds_left: of sampling; None while it is not known
    notes: lines that its user should read
    settings: those that it was made with, seed and all, once it is made
    files: names of what lies in its folder, once it is made
    seconds: of each stage, once it is made; peak_bytes: of GPU memory, None on a CPU; kept: share of blocks
    interrupted, died: how often it was begun again since the server, or the process that made it, had ended
    """

    id: str
    wish: Wish
    created_at: float
    status: Status = Status.QUEUED
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    stage: str = ""
    step: int = 0
    steps: int = 0
    seconds_left: float | None = None
    notes: tuple[str, ...] = ()
    error: JobError | None = None
    settings: Mapping[str, Any] | None = None
    files: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    kept: float | None = None
    interrupted: int = 0
    died: int = 0

    @property
    def progress(self) -> int:
        """Steps done of those to do, 0 to 100; 100 only once the video is there to be fetched."""
        if self.status is Status.COMPLETED:
            return 100
        return min(99, 100 * self.step // self.steps) if self.steps else 0


def new_id() -> str:
    """An id that nobody guesses."""
    return f"video_{secrets.token_hex(16)}"
