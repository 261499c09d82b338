"""The page's jobs without a browser: who sees which, how many wait, and what is said of them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from nabla import InputError
from wan.config.settings import resolve
from wan.serve.jobs.job import Job, JobError, Status, Wish
from wan.serve.jobs.queue import Queue
from wan.serve.limits import Limits, Visitor
from wan.serve.page import status
from wan.serve.page.visible import VisibleJobs
from wan.serve.page.visits import MAX_OF_SESSION, Visits, check_waiting
from wan.serve.page.wishes import to_wish
from wan.serve.workers.messages import DECODING, SAMPLING, Made, Progress

HERE, THERE = Visitor("10.0.0.1", "a"), Visitor("10.0.0.2", "b")
SETTINGS = resolve({"checkpoint": "here", "prompt": "A red circle", "sampling": {"seed": 7}}).to_dict()


@pytest.fixture
def queue(tmp_path) -> Queue:
    return Queue.open(tmp_path / "videos")


def submit(queue: Queue, visitor: Visitor = HERE, **wish) -> Job:
    [job] = queue.submit([Wish("small", {"prompt": "A red circle"}, source=visitor.address, **wish)])
    return job


def make(queue: Queue) -> Job:
    """The job whose turn it is, made."""
    job = queue.claim()
    files = {"video.mp4": b"video", "video.json": json.dumps({"settings": SETTINGS}).encode(), "thumbnail.webp": b"x"}
    assert queue.finish(job.id, Made(files, SETTINGS, {"sampling": 1.0}, None, None))
    return queue.get(job.id, "")


def job_of(state: Status = Status.IN_PROGRESS, **fields) -> Job:
    return Job("video_" + "0" * 32, Wish("small", {"prompt": "<b>A cat</b>"}), 1.0, state, **fields)


def test_visitors_see_the_jobs_of_their_address_and_all_where_none_else_reaches_the_page(queue):
    mine, theirs, token = submit(queue), submit(queue, THERE, via="page"), submit(queue, owner="0123456789abcdef")
    everyones, own = VisibleJobs(queue, everyones=True), VisibleJobs(queue, everyones=False)
    assert [job.id for job in everyones.list(HERE, 9).jobs] == [theirs.id, mine.id]
    assert [job.id for job in own.list(HERE, 9).jobs] == [mine.id] and own.list(THERE, 1).jobs == [theirs]
    assert everyones.list(HERE, 1).has_more and not own.list(HERE, 1).has_more
    assert own.get(mine.id, HERE) == mine and own.get(theirs.id, HERE) is None
    for jobs in (own, everyones):
        # What a token's owner asked for is for nobody who has none.
        assert jobs.get(token.id, HERE) is None and not jobs.delete(token.id, HERE)
        assert jobs.get("../videos", HERE) is None and not jobs.delete("", HERE)
    assert not own.delete(theirs.id, HERE) and everyones.delete(theirs.id, HERE)
    assert queue.get(theirs.id, "") is None and queue.get(token.id, token.wish.owner) == token


def test_a_session_has_so_many_waiting_and_cancels_them_all(queue):
    visits, other = Visits(queue), HERE._replace(session="other")
    wish = Wish("small", {"prompt": "x"}, source=HERE.address)

    def ask(_):
        try:
            return visits.submit(HERE, wish, {})
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(8) as several:
        answers = list(several.map(ask, range(40)))
    # One of them is the one that runs.
    assert sum(isinstance(one, Job) for one in answers) == MAX_OF_SESSION + 1 == len(visits.going(HERE))
    assert "4 of your videos are waiting already; try again when one is made" in answers
    kept = visits.submit(other, wish, {})
    make(queue)
    assert len(visits.going(HERE)) == MAX_OF_SESSION and isinstance(ask(0), Job)
    visits.cancel(Visitor("10.0.0.3", "a"))
    assert len(visits.going(HERE)) == MAX_OF_SESSION + 1
    visits.cancel(HERE)
    assert not visits.going(HERE) and visits.going(other) == [kept]
    assert queue.store.count()[Status.COMPLETED] == 1 and queue.store.count()[Status.QUEUED] == 1


def test_what_may_wait_of_a_session_an_address_and_all():
    with pytest.raises(InputError, match="4 of your videos are waiting already"):
        check_waiting([Visitor("a", "1")] * 5, Visitor("a", "1"))
    check_waiting([Visitor("a", str(n)) for n in range(10)], Visitor("a", "x"))
    with pytest.raises(InputError, match="10 videos from your address"):
        check_waiting([Visitor("a", str(n)) for n in range(11)], Visitor("a", "x"))
    check_waiting([Visitor("a", str(n)) for n in range(11)], Visitor("b", "x"))
    with pytest.raises(InputError, match="20 videos are waiting already"):
        check_waiting([Visitor(str(n), "x") for n in range(21)], Visitor("b", "x"))
    assert Visitor.at("2001:db8::1", "s") == Visitor.at("2001:db8::ffff:2", "s") != Visitor.at("2001:db9::1", "s")
    assert Visitor.at("::ffff:10.0.0.1", "s") == Visitor.at("10.0.0.1", "s") != Visitor.at("10.0.0.2", "s")


def test_pictures_go_with_a_wish_whose_settings_name_no_upload(tmp_path):
    (tmp_path / "video.PNG").write_bytes(b"picture")
    layer = SETTINGS | {"image": str(tmp_path / "video.PNG")}
    wish, uploads = to_wish(layer, "small", HERE, Limits())
    assert wish.inputs == {"image": "image.png"} and uploads == {"image.png": b"picture"}
    assert str(tmp_path) not in json.dumps(wish.layer) and (wish.source, wish.owner, wish.via) == (
        "10.0.0.1",
        "",
        "page",
    )
    assert resolve(wish.layer).sampling.seed == 7
    (tmp_path / "video.PNG").unlink()
    with pytest.raises(InputError, match=r"^picture video.PNG is no longer here; add it again$"):
        to_wish(layer, "small", HERE, Limits())
    with pytest.raises(InputError, match="50 steps are more than are taken here"):
        to_wish(SETTINGS, "small", HERE, Limits(steps=8))


def test_how_far_a_job_is_is_said():
    waiting, sampling = job_of(Status.QUEUED), job_of(stage=SAMPLING, step=2, steps=4, seconds_left=75.2)
    lines = [status.progress_line(waiting, ahead) for ahead in (0, 1, 2)]
    assert lines == ["Waiting", "Waiting for 1 video before it", "Waiting for 2 videos before it"]
    assert status.progress_line(sampling) == "Step 2 of 4, 1 min 15 s left" and "width: 50.0%" in status.job_html(
        sampling
    )
    assert status.progress_line(job_of(stage=DECODING, step=4, steps=4)) == "Decoding"
    assert [status.duration(seconds) for seconds in (3.4, 59.9, 3599.9, 7300)] == [
        "3 s",
        "60 s",
        "1 h 0 min",
        "2 h 1 min",
    ]


def test_what_the_page_says_is_escaped_and_names_no_folder(queue):
    settings = SETTINGS | {"image": "image.png"}
    failed = job_of(Status.FAILED, error=JobError("invalid_request", "/srv/<b>.mp4"), notes=("/srv/a <b>",))
    made = replace(job_of(Status.COMPLETED, files=("video.mp4",)), settings=settings)
    listed = status.list_html([failed, made, job_of(stage=SAMPLING)], True, made.id, {made.id: 1})
    texts = [status.said_html("<b>", "wrong"), status.notes_html(["<b>"]), status.job_html(failed), listed]
    assert all("<b>" not in text and "/srv" not in text for text in [*texts, status.result_html(made)])
    assert listed.count("<li ") == 3 and "Older ones" in listed and f'{made.id}" class="completed shown"' in listed
    assert "No videos yet" in status.list_html([], False, None, {})


def test_what_there_is_to_be_seen_of_a_job(queue):
    jobs, waiting = VisibleJobs(queue, everyones=True), submit(queue)
    assert status.result_html(None) == status.result_html(waiting, jobs.preview_time(waiting)) == status.NOTHING
    running = queue.claim()
    queue.tell(running.id, Progress(SAMPLING, 1, 2, preview=b"jpeg"))
    assert f'src="jobs/{running.id}/preview?' in status.result_html(running, jobs.preview_time(running))
    queue.give_back(running)
    made = make(queue)
    shown = status.result_html(made)
    assert f'<video id="video" src="jobs/{made.id}/video"' in shown and f'A-red-circle-{made.id[-8:]}.mp4"' in shown
    assert status.made_line(made) == "Made in 0 s: 1280x720, 81 frames, 50 steps, dense, seed 7"
    picture = status.result_html(replace(made, files=("video.png",)))
    assert '<img id="video"' in picture and "Save picture" in picture
    assert Path(queue.files.path(made.id, "video.mp4")).is_file()
