"""The API as OpenAI's own client drives it."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image
from served_api import MP4, SHEET, THUMBNAIL, TINY, Served, serve, settings_of

from nabla import InputError
from wan import client as own_client
from wan.serve.api.schema import VideoRequest, frames_of, seconds_of
from wan.serve.jobs.job import JobError
from wan.serve.limits import Visitor
from wan.serve.page.wishes import to_wish
from wan.serve.workers.messages import Made


@pytest.fixture(scope="module")
def server(random_nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("served"), random_nano) as served:
        yield served


@pytest.fixture
def served(server: Served) -> Iterator[Served]:
    """The server without jobs."""
    yield server
    store = server.service.queue.store
    while jobs := store.list("", limit=100).jobs:
        for job in jobs:
            server.service.queue.delete(job.id, "")


def create(served: Served, prompt: str = "A red circle", **more):
    extra = TINY | more.pop("extra_body", {})
    return served.client().videos.create(prompt=prompt, extra_body=extra, **more)


def png(width: int = 32, height: int = 32) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


def test_a_video_is_asked_for_watched_fetched_and_deleted(served: Served):
    client = served.client()
    video = create(served)
    assert (video.object, video.status, video.progress, video.model) == ("video", "queued", 0, "nano")
    assert (video.size, video.seconds, video.prompt, video.error) == ("32x32", "0.25", "A red circle", None)
    assert abs(video.created_at - time.time()) < 60 and video.completed_at is None

    begun = served.begin()
    assert begun == video.id
    served.tell(begun, 1, 2)
    running = client.videos.retrieve(video.id)
    assert (running.status, running.progress, running.stage) == ("in_progress", 50, "sampling")
    with pytest.raises(openai.NotFoundError, match="is in_progress"):
        client.videos.download_content(video.id)

    served.make(begun)
    done = client.videos.poll(video.id) if hasattr(client.videos, "poll") else client.videos.retrieve(video.id)
    assert (done.status, done.progress, done.stage_durations) == ("completed", 100, {"sampling": 1.5, "decode": 0.25})
    assert (done.inference_time_s, done.peak_memory_mb, done.kept_share) == (1.75, 3.0, 0.25)
    for variant, content, kind in (
        ("video", MP4, "video/mp4"),
        ("thumbnail", THUMBNAIL, "image/webp"),
        ("spritesheet", SHEET, "image/webp"),
    ):
        answer = client.videos.download_content(video.id, variant=variant)
        assert answer.read() == content
        assert answer.response.headers["content-type"] == kind

    deleted = client.videos.delete(video.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (video.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError, match="is not here"):
        client.videos.retrieve(video.id)
    assert not (served.service.queue.files.folder / video.id).exists()


def test_parts_of_a_video_are_fetched(served: Served):
    video = create(served)
    served.make()
    answer = served.client().videos.download_content(video.id, extra_headers={"Range": "bytes=2-6"})
    assert answer.read() == MP4[2:7]


def test_a_list_comes_in_pages(served: Served):
    client = served.client()
    ids = [create(served, f"number {number}").id for number in range(5)]
    page = client.videos.list(limit=2)
    assert [video.id for video in page.data] == ids[:2:-1]
    assert (page.has_more, page.first_id, page.last_id) == (True, ids[4], ids[3])
    assert [video.id for video in client.videos.list(limit=2)] == ids[::-1]
    assert [video.id for video in client.videos.list(order="asc", limit=3)] == ids
    assert not client.videos.list(after=ids[0]).data
    with pytest.raises(openai.BadRequestError, match="is not one of your videos"):
        client.videos.list(after="video_0")
    with pytest.raises(openai.BadRequestError, match="limit '0'"):
        client.videos.list(limit=0)


def test_a_remix_is_the_same_with_another_prompt(served: Served, monkeypatch: pytest.MonkeyPatch):
    client = served.client()
    picture = ("client/../name.png", png())
    video = create(served, input_reference=picture, model="pictures", extra_body={"seed": 5})
    with pytest.raises(openai.BadRequestError, match="remix it once it is completed"):
        client.videos.remix(video.id, prompt="A blue circle")
    served.make()
    with pytest.raises(openai.BadRequestError, match="a remix has the pictures of its source"):
        body = {"prompt": "A blue circle", "input_reference": "data:image/png;base64,AAAA"}
        client.post(f"/videos/{video.id}/remix", body=body, cast_to=dict)
    with monkeypatch.context() as patch, pytest.raises(openai.BadRequestError, match="use up to 1"):
        # As after a start with other limits.
        patch.setattr(served.service, "limits", replace(served.service.limits, steps=1))
        client.videos.remix(video.id, prompt="A blue circle")
    remix = client.videos.remix(video.id, prompt="A blue circle")
    assert (remix.remixed_from_video_id, remix.prompt, remix.seed) == (video.id, "A blue circle", 5)
    order = served.service.queue.order(served.service.queue.claim())
    assert order.layer["prompt"] == "A blue circle"
    assert (order.inputs["image"].name, order.inputs["image"].content) == ("image.png", png())


def test_every_field_becomes_a_setting(served: Served):
    library = served.service.library
    assert library is not None
    (library.folder / "style.safetensors").write_bytes(b"")
    fields = {
        "width": 48, "height": 32, "fps": 8, "negative_prompt": "blue", "num_inference_steps": 3, "guidance_scale": 4.5,
        "flow_shift": 3, "seed": 7, "lora": {"name": "style", "scale": 0.5}, "user": "me", "priority": -1,
        "extra_params": {"attention": {"algorithm": "keep-0.5", "dense_steps": 1}, "cache": {"kind": "taylorseer"}},
    }  # fmt: skip
    client = served.client()
    # Once as the form that OpenAI's client sends, once as JSON.
    by_form = client.videos.create(prompt="A circle", seconds="2", extra_body=fields).id
    by_json = client.post("/videos", body={"prompt": "A circle", "seconds": 2} | fields, cast_to=dict)["id"]
    with pytest.raises(openai.BadRequestError, match="lora has 9 files; use up to 8"):
        client.post("/videos", body={"prompt": "A circle", "lora": [{"name": "style"}] * 9}, cast_to=dict)
    (library.folder / "style.safetensors").unlink()
    for one in (by_form, by_json):
        made = settings_of(served, one)
        assert (made.video.size, made.video.fps, made.video.frame_num) == ((48, 32), 8, 17)
        assert (made.sampling.negative_prompt, made.sampling.steps, made.sampling.seed) == ("blue", 3, 7)
        assert (made.sampling.guide_scale, made.sampling.shift) == (4.5, 3)
        assert (made.attention.keep, made.attention.dense_steps) == (0.5, 1)
        assert made.cache is not None and made.cache.kind == "taylorseer"
        assert [(Path(lora.file).name, lora.scale) for lora in made.lora] == [("style.safetensors", 0.5)]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"size": "big"}, "size 'big' is not of the form widthxheight, such as 1280x720"),
        ({"num_frames": True}, "num_frames True: input should be neither true nor false"),
        ({"lora": "style"}, "lora.0 'style': input should be an object"),
        ({"lora": {"scale": 1}}, "lora.0.name: field required"),
        ({"prompt": " "}, "the prompt is empty; say what the video should show in prompt"),
        ({"size": "33x32"}, "both must be positive multiples of 16"),
        ({"num_frames": 6}, "num_frames 6 is not of the form 4n+1; use 5 or 9"),
        ({"num_frames": 5, "seconds": 1}, "give one"),
        ({"width": 32, "size": None}, "give either, and both sides"),
        ({"num_inference_steps": 0}, "num_inference_steps 0 is not a whole number"),
        ({"guidance_scale": 0.5}, "guidance_scale 0.5 is not a number of at least 1"),
        ({"guidance_scale_2": 3}, "give guidance_scale, the other's, too"),
        ({"guidance_scale": 3, "guidance_scale_2": 3}, "is for a checkpoint of two experts"),
        ({"fps": 0}, "fps 0 is not a whole number"),
        ({"seed": -2}, "seed -2 is not a whole number"),
        ({"n": 0}, "n 0: input should be greater than"),
        ({"n": 9}, "n 9 is more than 8"),
        ({"n": 2, "seed": 2**63 - 1}, "go beyond"),
        ({"priority": 1}, "priority 1 is more than 0"),
        ({"frames": 5}, "frames is not a field that is taken here"),
        ({"lora": {"name": "none"}}, "lora 'none' is not here"),
        ({"extra_params": {"checkpoint": "/"}}, "extra_params has an unknown key 'checkpoint'"),
        ({"extra_params": {"attention": {"algorithm": "odd"}}}, "odd"),
        ({"input_reference": "data:image/png;base64,AAAA"}, "input_reference is not taken by model nano"),
        ({"model": "pictures"}, "input_reference is missing"),
    ],
)
def test_what_cannot_be_made_is_said_in_a_line(served: Served, fields: dict, said: str):
    body = {"prompt": "A circle"} | TINY | fields
    with pytest.raises(openai.BadRequestError) as error:
        served.client().post("/videos", body=body, cast_to=dict)
    message = error.value.body["message"]
    assert said in message and "\n" not in message
    assert (error.value.type, error.value.code) == ("invalid_request_error", "invalid_value")
    assert error.value.param is None or error.value.param in {*TINY, *fields, "input_reference"}
    assert not served.service.queue.store.list("").jobs


def test_errors_are_exceptions_of_the_client(served: Served):
    client = served.client()
    with pytest.raises(openai.NotFoundError, match="model 'sora-2' is not here; use nano, pictures") as error:
        create(served, model="sora-2")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.videos.delete("video_0")
    with pytest.raises(openai.NotFoundError, match="there is nothing at GET /v1/chat"):
        client.get("/chat", cast_to=dict)
    with pytest.raises(openai.APIStatusError, match="PUT /v1/videos is not offered") as error:
        client.put("/videos", cast_to=dict)
    assert error.value.status_code == 405
    served_failed = create(served)
    served.fail("out_of_memory", "it takes 90 GB, and the GPU has 80")
    failed = client.videos.retrieve(served_failed.id)
    assert failed.status == "failed" and failed.error is not None
    assert (failed.error.code, failed.error.message) == ("out_of_memory", "it takes 90 GB, and the GPU has 80")


def test_a_fault_of_the_server_says_nothing_of_it(served: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(type(served.service.queue), "get", lambda *_: 1 / 0)
    with pytest.raises(openai.InternalServerError) as error:
        served.client().videos.retrieve("video_0")
    assert (error.value.code, error.value.body["message"]) == ("internal_error", "the server failed; its log says how")


def test_an_address_is_not_believed(served: Served):
    video = create(served, extra_headers={"X-Forwarded-For": "192.0.2.7"})
    job = served.service.queue.store.get(video.id)
    assert job is not None and job.wish.source == "127.0.0.1"


def test_several_videos_are_asked_for_at_once(served: Served):
    first = create(served, extra_body={"n": 3, "seed": 10})
    assert len(first.videos) == 3 and first.videos[0] == first.id
    assert [served.client().videos.retrieve(one).seed for one in first.videos] == [10, 11, 12]


def test_jobs_of_the_page_are_jobs_here(served: Served):
    own = served.service.models["nano"].resolve({}, needs_prompt=False).to_dict()
    layer = own | {"prompt": "A circle", "video": own["video"] | {"size": "48x32", "frame_num": 5}}
    wish, uploads = to_wish(layer, "The checkpoint's own", Visitor("192.0.2.7"), served.service.limits)
    [job] = served.service.queue.submit([wish], uploads)
    client = served.client()
    [listed] = client.videos.list().data
    assert (listed.id, listed.size, listed.model, listed.prompt) == (job.id, "48x32", wish.model, "A circle")
    served.make()
    assert client.videos.download_content(job.id).read() == MP4
    assert client.videos.remix(job.id, prompt="A square").size == "48x32"
    assert client.videos.delete(job.id).deleted


def test_a_repeated_request_is_the_first(served: Served):
    key = {"Idempotency-Key": "one"}
    first = create(served, extra_headers=key, extra_body={"n": 2})
    again = create(served, extra_headers=key, extra_body={"n": 2})
    assert first.videos == again.videos
    assert len(served.service.queue.store.list("").jobs) == 2
    others: list[dict[str, Any]] = [{"n": 1}, {"n": 2, "seed": 1}]
    for other in others:
        with pytest.raises(openai.ConflictError, match="was another request's"):
            create(served, extra_headers=key, extra_body=other)
    # Nor are they those of one who takes a video at once, and who would take them along.
    body = json.dumps(TINY | {"prompt": "A red circle", "n": 1}).encode()
    sent = {"Content_Type": "application/json", "Idempotency_Key": "one"}
    assert served.ask("POST", "/v1/videos/sync", body, **sent)[0] == 409
    assert len(served.service.queue.store.list("").jobs) == 2


@pytest.fixture
def maker(served: Served) -> Iterator[None]:
    """Someone who makes every video."""
    ending = threading.Event()

    def work() -> None:
        while not ending.wait(0.02):
            job = served.service.queue.claim()
            if job is not None and "fail" in job.wish.layer["prompt"]:
                served.service.queue.store.fail(job.id, ("invalid_request", "it cannot be"), None)
            elif job is not None:
                served.make(job.id)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    ending.set()
    thread.join()


def test_a_video_is_made_and_sent_at_once(served: Served, maker: None):
    client = served.client()
    kind = openai.HttpxBinaryResponseContent
    answer = client.post("/videos/sync", body={"prompt": "A circle"} | TINY, cast_to=kind)
    headers = answer.response.headers
    assert answer.read() == MP4
    assert headers["x-model"] == "nano" and headers["x-request-id"].startswith("video_")
    assert (headers["x-inference-time-s"], headers["x-peak-memory-mb"]) == ("1.750", "3.0")
    assert headers["x-stage-durations"] == '{"sampling": 1.5, "decode": 0.25}'
    with pytest.raises(openai.BadRequestError, match="it cannot be"):
        client.post("/videos/sync", body={"prompt": "fail"} | TINY, cast_to=kind)
    with pytest.raises(openai.BadRequestError, match="n is 1 where one video is sent back"):
        client.post("/videos/sync", body={"prompt": "A circle", "n": 2} | TINY, cast_to=kind)


def test_a_client_that_goes_away_takes_its_job_with_it(served: Served):
    with pytest.raises(openai.APITimeoutError):
        served.client(timeout=0.5).post("/videos/sync", body={"prompt": "A circle"} | TINY, cast_to=bytes)
    until = time.monotonic() + 10
    while served.service.queue.store.list("").jobs and time.monotonic() < until:
        time.sleep(0.02)
    assert not served.service.queue.store.list("").jobs


@pytest.mark.parametrize(("raised", "code", "left"), [(KeyboardInterrupt(), 130, 0), (InputError("no answer"), 2, 1)])
def test_our_client_takes_its_job_with_it_only_if_it_is_ended(
    served: Served, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, left: int
):
    def fails(*_: object) -> None:
        raise raised

    monkeypatch.setattr(own_client, "watch", fails)
    assert own_client.main(["A red circle", "--size", "32x32", "--url", f"http://127.0.0.1:{served.port}"]) == code
    assert len(served.service.queue.store.list("").jobs) == left


def test_progress_comes_as_events(served: Served):
    video, seen = create(served), []
    stream = served.client().get(
        f"/videos/{video.id}/events", cast_to=object, stream=True, stream_cls=openai.Stream[object]
    )
    for one in stream:
        seen.append((one["status"], one["progress"], one["jobs_ahead"]))
        match seen[-1]:
            case ("queued", *_):
                served.begin()
            case ("in_progress", 0, _):
                served.tell(video.id, 1, 2)
            case ("in_progress", 50, _):
                served.make(video.id)
    assert seen == [("queued", 0, 0), ("in_progress", 0, None), ("in_progress", 50, None), ("completed", 100, None)]


def test_models_health_metrics_and_reference(served: Served):
    client = served.client()
    assert [model.id for model in client.models.list()] == ["nano", "pictures"]
    assert client.models.retrieve("pictures").input_reference
    create(served)
    served.make()
    create(served)
    health = client._client.get(f"http://127.0.0.1:{served.port}/health")
    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    text = client._client.get(f"http://127.0.0.1:{served.port}/metrics").text
    for line in (
        'wan_jobs{status="queued"} 1.0',
        'wan_stage_seconds_count{stage="sampling"}',
        "wan_kept_share_sum",
        'wan_http_requests_total{route="/v1/videos",status="200"}',
        "wan_gpu_peak_bytes 3.145728e+06",
    ):
        assert line in text
    assert "_created" not in text
    made = [line for line in text.splitlines() if line.startswith("wan_videos_total")]
    deleted = served.begin()
    served.service.queue.remove(deleted)
    # Whoever makes it does not know yet.
    served.service.queue.finish(deleted, Made({}, {}, {}, None, None))
    served.service.queue.fail(deleted, JobError("internal_error", "it failed"))
    assert set(made) <= {*served.service.metrics.text().decode().splitlines()}
    page = client._client.get(f"http://127.0.0.1:{served.port}/docs").text
    assert "POST /v1/videos/{video_id}/remix" in page and "num_inference_steps" in page
    assert all(escape(field.description or "without one") in page for field in VideoRequest.model_fields.values())
    assert page.index("POST /v1/videos<") < page.index("/content")
    assert "<script" not in page and "://" not in page


def test_lengths_are_rounded_to_what_can_be_made():
    assert [frames_of(seconds, 16, 4) for seconds in (5, 4, 0.1, 0.125, 10)] == [81, 65, 1, 5, 161]
    assert [seconds_of(frames, 16) for frames in (81, 65, 1)] == [5, 4, 0]
