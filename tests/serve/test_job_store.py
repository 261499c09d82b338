"""Jobs that are asked for, made, given back and deleted, in the store that is the default."""

from __future__ import annotations

import sqlite3
import threading

import pytest

from nabla import InputError
from wan.serve.jobs import sqlite as sqlite_jobs
from wan.serve.jobs.job import Job, JobError, Status, Wish, new_id
from wan.serve.jobs.sqlite import SqliteStore
from wan.serve.jobs.store import QueueFull, QueueLimits

FREE = QueueLimits()


@pytest.fixture
def store(tmp_path):
    opened = SqliteStore(tmp_path / "jobs.sqlite")
    yield opened
    opened.close()


def job(created_at: float = 0.0, **wish) -> Job:
    return Job(new_id(), Wish("nabla_0.7", {"prompt": "A cat"} | wish.pop("layer", {}), **wish), created_at)


def add(store: SqliteStore, *jobs: Job) -> list[Job]:
    return [store.add([one], FREE)[0] for one in jobs]


def ids(jobs) -> list[str]:
    return [one.id for one in jobs]


def test_a_job_is_kept_as_it_was_given(store):
    layer = {
        "prompt": "\0 ' 猫 \ud800 \U0001f63a",
        "seed": 2**64,
        "negative_prompt": None,
        "attention": {"pool": [1, 4, 4]},
    }
    wish = Wish("a", layer, {"image": "image.png"}, "0a", "::1", -3, "once", "video_1", "page")
    given = Job(new_id(), wish, 1.5)
    assert store.add([given], FREE) == [given]
    assert store.get(given.id) == given and store.get(new_id()) is None


def test_what_becomes_of_a_job_is_kept(store):
    [one] = add(store, job())
    assert store.claim().status is Status.IN_PROGRESS
    assert store.tell(one.id, stage="sampling", step=1, steps=3, seconds_left=2.5, notes=("slow",))
    told = store.get(one.id)
    assert (told.stage, told.progress, told.seconds_left, told.notes) == ("sampling", 33, 2.5, ("slow",))
    made = {"settings": {"seed": 1, "lora": None}, "files": ("video.mp4",), "seconds": {"decode": 0.5}, "kept": 0.25}
    assert store.finish(one.id, made, 9.0)
    done = store.get(one.id)
    assert done.status is Status.COMPLETED and done.progress == 100 and done.expires_at == 9.0
    assert done.completed_at >= done.started_at > 0
    assert {name: getattr(done, name) for name in made} == made


def test_a_job_fails_with_a_reason(store):
    [one] = add(store, job())
    store.claim()
    assert store.fail(one.id, JobError("out_of_memory", "too large"), 5.0)
    failed = store.get(one.id)
    assert (failed.status, failed.error, failed.expires_at) == (Status.FAILED, ("out_of_memory", "too large"), 5.0)


def test_a_word_that_no_job_has_is_a_bug(store):
    with pytest.raises(TypeError, match="sped"):
        store.tell("video_1", sped=1)


def test_the_first_that_came_is_made_first_and_priorities_before_it(store):
    jobs = add(store, job(priority=0), job(priority=0), job(priority=5), job(priority=-1))
    first, second, urgent, idle = ids(jobs)
    assert [store.ahead(one) for one in (urgent, first, second, idle)] == [0, 1, 2, 3]
    assert store.claim().id == urgent
    assert [store.ahead(one) for one in (urgent, first, second)] == [0, 1, 2]
    assert [store.claim().id for _ in range(3)] == [first, second, idle]
    assert store.claim() is None


def test_a_job_that_is_given_back_keeps_its_place(store):
    first, second = add(store, job(), job())
    store.claim()
    store.tell(first.id, stage="sampling", step=1, steps=2, notes=("slow",))
    assert store.give_back(first.id, died=True)
    again = store.claim()
    assert (again.id, again.died, again.interrupted, again.step, again.notes) == (first.id, 1, 0, 0, ())
    store.claim()
    assert store.give_back_all() == 2 and store.give_back_all() == 0
    assert [(one.id, one.interrupted) for one in (store.claim(), store.claim())] == [(first.id, 1), (second.id, 1)]


def test_who_makes_a_deleted_job_hears_so(store):
    [one] = add(store, job())
    store.claim()
    assert store.delete(one.id) and not store.delete(one.id)
    assert store.get(one.id) is None and store.list("").jobs == []
    assert not store.tell(one.id, step=1) and not store.give_back(one.id, died=False)
    assert not store.finish(one.id, {}, None) and not store.fail(one.id, JobError("", ""))
    assert store.give_back_all() == 0


@pytest.mark.parametrize("newest_first", [True, False])
def test_a_list_goes_on_where_a_page_of_it_ended(store, newest_first):
    # Two came at the same time, and a clock was set back.
    jobs = ids(add(store, job(5.0), job(5.0), job(1.0), job(2.0), job(3.0, owner="other")))[:4]
    expected = jobs[::-1] if newest_first else jobs
    first = store.list("", limit=3, newest_first=newest_first)
    last = store.list("", first.jobs[-1].id, 3, newest_first)
    assert (ids(first.jobs), first.has_more) == (expected[:3], True)
    assert (ids(last.jobs), last.has_more) == (expected[3:], False)


def test_a_list_has_only_jobs_of_its_owner(store):
    own, other, page = add(store, job(owner="a"), job(owner="b"), job(owner="a", source="::1"))
    assert ids(store.list("a").jobs) == [page.id, own.id]
    assert ids(store.list("a", source="::1").jobs) == [page.id] and store.list("b", source="::1").jobs == []
    for stranger in (other.id, "video_1"):
        with pytest.raises(KeyError):
            store.list("a", after=stranger)


def test_a_request_that_comes_twice_is_one(store):
    first = store.add([job(key="k"), job(key="k")], FREE)
    assert store.add([job(key="k"), job(key="k")], FREE) == first
    assert store.add([job(key="k", owner="other")], FREE) != first[:1]
    assert store.count()[Status.QUEUED] == 3
    for one in first:
        store.delete(one.id)
    assert store.add([job(key="k")], FREE)[0] not in first


def test_a_full_queue_takes_all_of_a_request_or_none(store):
    limits = QueueLimits(waiting=3, of_source=2)
    store.add([job(source="a"), job(source="a")], limits)
    with pytest.raises(QueueFull, match="2 of your videos") as full:
        store.add([job(source="a")], limits)
    assert full.value.retry_after >= 1
    with pytest.raises(QueueFull, match="3 videos are waiting"):
        store.add([job(source="b"), job(source="c")], limits)
    assert store.count()[Status.QUEUED] == 2
    store.claim()
    assert store.add([job(source="a")], limits)
    assert {**store.count()} == {"queued": 2, "in_progress": 1, "completed": 0, "failed": 0}
    assert {**store.count([Status.QUEUED, Status.FAILED])} == {"queued": 2, "failed": 0}


def test_jobs_that_ended_are_found_by_their_end(store):
    jobs = add(store, job(), job(), job(), job())
    for expires_at in (7.0, None, 5.0):
        store.finish(store.claim().id, {}, expires_at)
    assert store.ended_first() == ids(jobs[:3])
    assert store.expired_by(4.9) == [] and store.expired_by(6) == [jobs[2].id]
    assert store.expired_by(7) == [jobs[0].id, jobs[2].id]


def test_no_job_is_claimed_twice_by_many_threads(store):
    jobs = ids(add(store, *(job() for _ in range(40))))
    claimed: list[str] = []

    def work() -> None:
        while one := store.claim():
            claimed.append(one.id)
            store.finish(one.id, {}, None)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(jobs) and store.count()[Status.COMPLETED] == 40


def test_a_file_of_an_earlier_version_is_brought_to_this_one(tmp_path, monkeypatch):
    path = tmp_path / "jobs.sqlite"
    store = SqliteStore(path)
    [one] = add(store, job())
    store.close()
    later = (*sqlite_jobs.MIGRATIONS, ("UPDATE jobs SET job = json_set(job, '$.stage', 'moved')",))
    monkeypatch.setattr(sqlite_jobs, "MIGRATIONS", later)
    for _ in range(2):
        store = SqliteStore(path)
        assert store.get(one.id).stage == "moved"
        store.close()
    monkeypatch.setattr(sqlite_jobs, "MIGRATIONS", later[:1])
    with pytest.raises(InputError, match="newer version"):
        SqliteStore(path)


def test_a_migration_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "jobs.sqlite"
    store = SqliteStore(path)
    [one] = add(store, job())
    store.close()
    broken = ("DELETE FROM jobs", "no statement")
    with monkeypatch.context() as patched, pytest.raises(InputError, match="syntax error"):
        patched.setattr(sqlite_jobs, "MIGRATIONS", (*sqlite_jobs.MIGRATIONS, broken))
        SqliteStore(path)
    assert SqliteStore(path).get(one.id) == one


def test_a_file_that_is_no_database_is_said_in_a_line(tmp_path):
    (tmp_path / "jobs.sqlite").write_text("a letter, long enough to be more than a header of a database " * 20)
    with pytest.raises(InputError, match="cannot keep jobs"):
        SqliteStore(tmp_path / "jobs.sqlite")
    with pytest.raises(InputError, match="cannot keep jobs"):
        SqliteStore(tmp_path / "nowhere" / "jobs.sqlite")


def test_what_is_committed_is_on_the_disk(store):
    with store._connected() as database:
        assert database.execute("PRAGMA synchronous").fetchone() == (2,)
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert isinstance(database, sqlite3.Connection)
