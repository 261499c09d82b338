"""Jobs in one file of SQLite, for several threads and processes of one machine at once."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from nabla import InputError
from wan.serve.jobs.job import Job, JobError, Status, Wish
from wan.serve.jobs.store import Listed, QueueFull, QueueLimits, StorageError

# How long a call waits for those of others, in seconds; each takes milliseconds.
PATIENCE = 30.0
# Of how many jobs that were made last the mean time is told to whom the queue is full for.
RECENT = 10
# Others of SQLite's are bugs. The second byte says more.
FAULTS_OF_DISKS = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
)

# What brings a file from each version to the next. A job is JSON, so a new field with a default needs no more than an
# empty step, by which an older program knows that it cannot read the file. Columns are what is looked for; the place
# stands for the time that a job came, since clocks are set back.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE jobs (
            place INTEGER PRIMARY KEY AUTOINCREMENT,
            job TEXT NOT NULL,
            id TEXT AS (json_extract(job, '$.id')),
            status TEXT AS (json_extract(job, '$.status')),
            completed_at REAL AS (json_extract(job, '$.completed_at')),
            expires_at REAL AS (json_extract(job, '$.expires_at')),
            owner TEXT AS (json_extract(job, '$.wish.owner')),
            source TEXT AS (json_extract(job, '$.wish.source')),
            priority INTEGER AS (json_extract(job, '$.wish.priority')),
            key TEXT AS (json_extract(job, '$.wish.key'))
        )""",
        "CREATE UNIQUE INDEX by_id ON jobs (id)",
        "CREATE INDEX by_turn ON jobs (status, priority DESC, place)",
        "CREATE INDEX by_owner ON jobs (owner, place)",
        "CREATE INDEX by_source ON jobs (owner, source, place)",
        "CREATE INDEX by_key ON jobs (owner, key) WHERE key IS NOT NULL",
        "CREATE INDEX by_end ON jobs (completed_at) WHERE completed_at IS NOT NULL",
        "CREATE INDEX by_expiry ON jobs (expires_at) WHERE expires_at IS NOT NULL",
    ),
)


class SqliteStore:
    """The `JobStore` of a file, which is made if it is not there; on a disk of this machine, whose locks SQLite needs.

    Raises `InputError` for a file that cannot be opened, is no database, or is of a newer version of this program.
    """

    def __init__(self, path: Path):
        self.path = path
        # Those that no call uses now. Not one a thread, for an HTTP server's threads come and go.
        self._idle: list[sqlite3.Connection] = []
        try:
            with self._writing() as database:
                self._migrate(database)
        except (sqlite3.DatabaseError, StorageError) as error:
            self.close()
            reason = error.__cause__ or error
            raise InputError(f"{path} cannot keep jobs ({reason}); move it away, or choose another folder") from None

    def add(self, jobs: Sequence[Job], limits: QueueLimits) -> Sequence[Job]:
        with self._writing() as database:
            if known := self._known(database, jobs):
                return known
            for job in jobs:
                self._check_room(database, job.wish.source, limits)
                database.execute("INSERT INTO jobs (job) VALUES (?)", [json.dumps(asdict(job))])
        return [*jobs]

    def get(self, job_id: str) -> Job | None:
        found = self._ask("SELECT job FROM jobs WHERE id = ?", job_id)
        return _read(found[0][0]) if found else None

    def list(
        self,
        owner: str,
        after: str | None = None,
        limit: int = 20,
        newest_first: bool = True,
        source: str | None = None,
    ) -> Listed:
        where, values = ("owner = ?", [owner]) if source is None else ("owner = ? AND source = ?", [owner, source])
        if after is not None:
            found = self._ask(f"SELECT place FROM jobs WHERE {where} AND id = ?", *values, after)
            if not found:
                raise KeyError(after)
            where, values = f"{where} AND place {'<' if newest_first else '>'} ?", [*values, found[0][0]]
        order = "DESC" if newest_first else "ASC"
        # One more than is asked for, to know whether there is more.
        rows = self._ask(f"SELECT job FROM jobs WHERE {where} ORDER BY place {order} LIMIT ?", *values, limit + 1)
        return Listed([_read(job) for (job,) in rows[:limit]], len(rows) > limit)

    def claim(self) -> Job | None:
        changed, values = _changed(status=Status.IN_PROGRESS, started_at=time.time())
        claimed = self._ask(
            f"UPDATE jobs SET job = {changed} WHERE place = (SELECT place FROM jobs WHERE status = 'queued'"
            " ORDER BY priority DESC, place LIMIT 1) RETURNING job",
            *values,
        )
        return _read(claimed[0][0]) if claimed else None

    def tell(self, job_id: str, **progress: Any) -> bool:
        return self._change(job_id, **progress)

    def finish(self, job_id: str, made: Mapping[str, Any], expires_at: float | None) -> bool:
        return self._end(job_id, Status.COMPLETED, expires_at, **made)

    def fail(self, job_id: str, error: JobError, expires_at: float | None = None) -> bool:
        return self._end(job_id, Status.FAILED, expires_at, error=error)

    def give_back(self, job_id: str, died: bool) -> bool:
        return self._give_back("died" if died else "interrupted", job_id) > 0

    def give_back_all(self) -> int:
        return self._give_back("interrupted")

    def delete(self, job_id: str) -> bool:
        return bool(self._ask("DELETE FROM jobs WHERE id = ? RETURNING id", job_id))

    def ahead(self, job_id: str) -> int:
        return self._ask(
            "SELECT count(*) FROM jobs AS one,"
            " (SELECT priority, place FROM jobs WHERE id = ? AND status = 'queued') AS own"
            " WHERE one.status = 'in_progress' OR one.status = 'queued'"
            " AND (one.priority > own.priority OR one.priority = own.priority AND one.place < own.place)",
            job_id,
        )[0][0]

    def count(self, statuses: Collection[Status] = tuple(Status)) -> dict[Status, int]:
        among = ", ".join("?" * len(statuses))
        counts = f"SELECT status, count(*) FROM jobs WHERE status IN ({among}) GROUP BY 1"
        return dict.fromkeys(statuses, 0) | {Status(status): count for status, count in self._ask(counts, *statuses)}

    def expired_by(self, time: float) -> Sequence[str]:
        return [one for (one,) in self._ask("SELECT id FROM jobs WHERE expires_at <= ? ORDER BY completed_at", time)]

    def ended_first(self) -> Sequence[str]:
        return [one for (one,) in self._ask("SELECT id FROM jobs WHERE completed_at IS NOT NULL ORDER BY completed_at")]

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    def _end(self, job_id: str, status: Status, expires_at: float | None, **ending: Any) -> bool:
        return self._change(job_id, status=status, completed_at=time.time(), expires_at=expires_at, **ending)

    def _change(self, job_id: str, **news: Any) -> bool:
        """Set fields of a job in progress; False if it is not, as when it was deleted."""
        changed, values = _changed(**news)
        statement = f"UPDATE jobs SET job = {changed} WHERE id = ? AND status = 'in_progress' RETURNING id"
        return bool(self._ask(statement, *values, job_id))

    def _give_back(self, counter: str, job_id: str | None = None) -> int:
        """Have a job in progress, or all, wait at the place that it has; its counter goes up."""
        changed, values = _changed(
            status=Status.QUEUED, started_at=None, stage="", step=0, steps=0, seconds_left=None, notes=()
        )
        given_back = self._ask(
            f"UPDATE jobs SET job = json_set({changed}, '$.{counter}', json_extract(job, '$.{counter}') + 1)"
            " WHERE status = 'in_progress' AND id = coalesce(?, id) RETURNING id",
            *values,
            job_id,
        )
        return len(given_back)

    def _known(self, database: sqlite3.Connection, jobs: Sequence[Job]) -> Sequence[Job]:
        """The jobs of an earlier request with the idempotency key of these, which have one key."""
        wish = jobs[0].wish
        rows = database.execute(
            "SELECT job FROM jobs WHERE owner = ? AND key = ? ORDER BY place", [wish.owner, wish.key]
        )
        return [_read(job) for (job,) in rows]

    def _check_room(self, database: sqlite3.Connection, source: str, limits: QueueLimits) -> None:
        waiting = "SELECT count(*), coalesce(sum(source = ?), 0) FROM jobs WHERE status = 'queued'"
        everyone, own = database.execute(waiting, [source]).fetchone()
        if everyone >= limits.waiting:
            full = f"{everyone} videos are waiting, and no more may"
        elif own >= limits.of_source:
            full = f"{own} of your videos are waiting, and no more may"
        else:
            return
        raise QueueFull(f"{full}; try again when one is made", self._seconds_of_one(database))

    def _seconds_of_one(self, database: sqlite3.Connection) -> int:
        """How long the jobs that were made last took, a whole number from 1 on."""
        (mean,) = database.execute(
            "SELECT avg(completed_at - json_extract(job, '$.started_at')) FROM (SELECT job, completed_at FROM jobs"
            " WHERE completed_at IS NOT NULL AND status = 'completed' ORDER BY completed_at DESC LIMIT ?)",
            [RECENT],
        ).fetchone()
        return max(1, round(mean or 0))

    def _migrate(self, database: sqlite3.Connection) -> None:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise InputError(f"{self.path} is of a newer version of this program; update it, or choose another folder")
        for step in MIGRATIONS[version:]:
            for statement in step:
                database.execute(statement)
        database.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

    def _ask(self, statement: str, *values: Any) -> Sequence[tuple]:
        """All rows of one statement, which is a transaction of its own, and on the disk once its rows are read."""
        with self._connected() as database, closing(database.execute(statement, values)) as rows:
            return rows.fetchall()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A connection that alone may write, so that what is read is so until it is written."""
        with self._connected() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("COMMIT")
            except BaseException:
                database.rollback()
                raise

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        try:
            try:
                database = self._idle.pop()
            except IndexError:
                database = self._connect()
            try:
                yield database
            finally:
                self._idle.append(database)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in FAULTS_OF_DISKS:
                raise
            raise StorageError(f"the server cannot keep jobs ({error})") from error

    def _connect(self) -> sqlite3.Connection:
        # Without Python's own transactions: it would begin them late, when another may write already.
        database = sqlite3.connect(self.path, PATIENCE, isolation_level=None, check_same_thread=False)
        # Readers and a writer do not wait for each other, and what is committed is on the disk.
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        return database


NAMES = {field.name for field in fields(Job)}


def _changed(**news: Any) -> tuple[str, list[Any]]:
    """The words of SQL for a job with other fields, and their values."""
    unknown = news.keys() - NAMES
    if unknown:
        raise TypeError(f"a job has no {', '.join(sorted(unknown))}")
    values = [one for name, value in news.items() for one in (f"$.{name}", json.dumps(value))]
    return f"json_set(job{', ?, json(?)' * len(news)})", values


def _read(text: str) -> Job:
    read = json.loads(text)
    read["wish"] = Wish(**read["wish"])
    read["status"] = Status(read["status"])
    read["error"] = read["error"] and JobError(*read["error"])
    for name in ("notes", "files"):
        read[name] = tuple(read[name])
    return Job(**read)
