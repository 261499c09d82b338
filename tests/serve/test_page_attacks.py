"""The page attacked by raw requests, as foreign pages, other machines and greedy visitors would send them."""

from __future__ import annotations

import http.client
import io
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from PIL import Image
from stand_in_maker import ThreadEngine

from nabla import InputError
from wan import WanT2V
from wan.config.settings import resolve
from wan.models import recognise as recognition
from wan.models.family import MediaInputs
from wan.models.wan.family import WAN
from wan.run.request import Options
from wan.serve.jobs.job import Job, Wish
from wan.serve.jobs.queue import Queue
from wan.serve.limits import Limits
from wan.serve.page import pictures
from wan.serve.shown import sidecar_to_share, without_folders
from wan.serve.workers.dispatcher import Dispatcher
from wan.serve.workers.maker import Maker

pytest.importorskip("gradio", reason="needs gradio: pip install -r requirements-page.txt")

BOUNDARY = "zz"
MULTIPART = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
JSON = {"Content-Type": "application/json"}
CONTROLS = {
    "rows": None, "seen": None, "base": None, "chosen": None, "prompt": "A red circle", "negative": "", "size": "32x32",
    "frames": 1, "seed": "1", "steps": 2, "guidance": 1.0, "shift": 5.0, "solver": "unipc", "lora": [], "scales": "",
    "algorithm": "dense", "dense_steps": 0, "refresh": 1, "backend": "auto", "fp8": False, "cache": False,
}  # fmt: skip


@dataclass
class Served:
    """A page that is served, and requests to it."""

    port: int
    queue: Queue
    checkpoint: Path

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str | None):
        """Status, headers and text of an answer; a header of None is left out."""
        headers = {"Host": f"127.0.0.1:{self.port}"} | {key.replace("_", "-"): value for key, value in headers.items()}
        if body is not None:
            headers = {"Content-Length": str(len(body))} | headers
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for key, value in headers.items():
            if value is not None:
                connection.putheader(key, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        try:
            return answer.status, answer.headers, answer.read().decode(errors="replace")
        finally:
            connection.close()

    def event(self, target: str) -> int:
        config = json.loads(self.ask("GET", "/config")[2])
        return next(one["id"] for one in config["dependencies"] if one["api_name"] == target)

    def generate(self, session: str, **changes: object) -> int:
        """Ask for a video as the page's script does; the status."""
        body = {
            "data": list((CONTROLS | changes).values()),
            "fn_index": self.event("generate"),
            "session_hash": session,
        }
        return self.ask("POST", "/gradio_api/queue/join", json.dumps(body).encode(), **JSON)[0]

    def upload(self, content: bytes, name: str) -> str:
        """The path at which the server keeps a file that a visitor of the page sends."""
        cookie = self.ask("GET", "/")[1]["Set-Cookie"].split(";")[0]
        return json.loads(self.ask("POST", "/gradio_api/upload", form(content, name), **MULTIPART, Cookie=cookie)[2])[0]

    def give(self, target: str, path: str, session: str) -> str:
        """All that a session is told of an event that is given a file and the page's settings."""
        data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, None]
        body = json.dumps({"data": data, "fn_index": self.event(target), "session_hash": session}).encode()
        assert self.ask("POST", "/gradio_api/queue/join", body, **JSON)[0] == 200
        return self.hear(session)

    def hear(self, session: str) -> str:
        """All that a session is told of what it asked for last."""
        return self.ask("GET", f"/gradio_api/queue/data?session_hash={session}")[2]

    def run(self, event: str, session: str, **event_data: object) -> str:
        """What a session is told of an event that does not wait in gradio's queue."""
        body = {"data": [None] * 3, "session_hash": session, "event_data": event_data or None}
        return self.ask("POST", f"/gradio_api/run/{event}", json.dumps(body).encode(), **JSON)[2]

    def follow(self, session: str) -> str:
        """The line that a session is told of the video that it asked for, once that has ended."""
        told = [self.hear(session)]
        ended = re.compile(r'class=\\"status (?:done|wrong)\\" role=\\"\w+\\">([^<]*)<')
        self.until(lambda: told.append(self.run("look", session)) or ended.search(told[-1]))
        return ended.search(told[-1])[1]

    def going(self, prompt: str) -> list[Job]:
        """The jobs that have not ended, by how their prompts begin."""
        jobs = self.queue.list("", limit=300).jobs
        return [one for one in jobs if one.wish.layer["prompt"].startswith(prompt) and not one.status.has_ended]

    def until(self, condition) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture(scope="module")
def page(random_nano, tmp_path_factory) -> Iterator[Served]:
    from wan.serve.lora_library import LoraLibrary
    from wan.serve.page.server import Address, make_page, serve
    from wan.serve.page.visible import VisibleJobs
    from wan.serve.presets import Presets

    folder = tmp_path_factory.mktemp("attacked")
    queue = Queue.open(folder / "videos")
    # In this process, so that a test can change what a family takes.
    engine = ThreadEngine(maker=Maker(Options(device="cpu"), str(random_nano)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "gradio"))
        with Dispatcher(queue, engine):
            library, presets = LoraLibrary(folder / "loras"), Presets({"checkpoint": str(random_nano)}, "x")
            served = make_page(VisibleJobs(queue, everyones=False), Limits(steps=900), presets, library)
            url = serve(served, library, Address(allowed_hosts=("video.example.org",)), wait=False)
            try:
                yield Served(urlsplit(url).port, queue, random_nano)
            finally:
                served.close()


PATHS = ("GET /", "GET /config", "POST /gradio_api/queue/join", "POST /gradio_api/upload",
         "POST /gradio_api/run/cancel",
         "GET /gradio_api/queue/data?session_hash=x", "GET /gradio_api/heartbeat/x", "OPTIONS /gradio_api/upload",
         "GET /assets/x.js",
         "POST /gradio_api/run/use", "GET /jobs/video_00000000000000000000000000000000/video")  # fmt: skip


@pytest.mark.parametrize("where", PATHS)
def test_a_foreign_host_or_origin_is_refused_everywhere_in_one_line_and_without_cors(page, where):
    method, path = where.split()
    body = b"{}" if method == "POST" else None
    hosts = (
        None,
        "",
        "evil.example",
        f"evil.example:{page.port}",
        "127.0.0.1",
        "127.0.0.1:1",
        f"127.0.0.1.x:{page.port}",
    )
    own = f"127.0.0.1:{page.port}"
    origins = ("null", "", "http://evil.example", f"https://{own}", "http://127.0.0.1:1", f"http://{own}@evil.example",
               f"http://{own}/", f"file://{own}")  # fmt: skip
    preflight = {"Access_Control_Request_Method": "POST"}
    for headers in (*({"Host": host} for host in hosts), *({"Origin": origin} for origin in origins)):
        # What is no HTTP at all, the server answers itself, and reads no body, which could cut its answer off.
        sent = None if headers == {"Host": None} else body
        status, answered, text = page.ask(method, path, sent, **headers, **preflight)
        assert status == 403 or (headers == {"Host": None} and status == 400), (headers, status)
        assert text.count("\n") <= 1 and not [name for name in answered if name.lower().startswith("access-control")]


def test_the_page_s_own_names_are_answered(page):
    for host in (f"localhost:{page.port}", f"127.0.0.1:{page.port}", f"[::1]:{page.port}", "video.example.org"):
        assert page.ask("GET", "/config", Host=host)[0] == 200
    assert page.ask("GET", "/config", Origin=f"http://localhost:{page.port}")[0] == 200
    assert page.ask("GET", "/config", Origin="https://video.example.org")[0] == 200
    status, headers, _ = page.ask("GET", "/", Sec_Fetch_Site="cross-site")
    assert status == 200 and headers["X-Frame-Options"] == "DENY"
    assert page.ask("GET", "/config", Sec_Fetch_Site="cross-site")[0] == 403


@pytest.mark.parametrize("name", ("", "a b", "http://x", "x/y", "x:port", "*"))
def test_an_allowed_host_that_is_none(name):
    from wan.serve.page.guard import Guard

    with pytest.raises(InputError, match="is not a host; give video.example.org"):
        Guard(None, "127.0.0.1", [name], list, int, 1, 1)


def form(content: bytes = b"{}", name: str = "x.json") -> bytes:
    start = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return start.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()


def test_an_upload_needs_the_token_that_comes_with_the_page(page, monkeypatch):
    cookie = page.ask("GET", "/")[1]["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    own = cookie.split(";")[0]
    wrong = own[:-1] + ("a" if own[-1] != "a" else "b")
    for sent in (None, "", wrong, own.split("=")[0] + "=", "é=\x01"):
        assert (
            page.ask("POST", "/gradio_api/upload", form(), **MULTIPART, Cookie=sent and sent.encode("latin-1"))[0]
            == 403
        )
    status, _, text = page.ask("POST", "/gradio_api/upload", form(), **MULTIPART, Cookie=own)
    [path] = json.loads(text)
    assert status == 200
    # Who sent it needs it no more, and others shall not have it.
    assert page.ask("GET", f"/gradio_api/file={quote(path)}")[0] == 403
    for name in ("../../x.json", "..%2fx.json", "/etc/x.json"):
        _, _, text = page.ask("POST", "/gradio_api/upload", form(name=name), **MULTIPART, Cookie=own)
        assert Path(json.loads(text)[0]).is_relative_to(Path(path).parents[1])
    for length, status in (("9" * 12, 413), ("-1", 400), (None, 411), (str(20 << 40), 413)):
        assert page.ask("POST", "/gradio_api/upload", b"", **MULTIPART, Cookie=own, Content_Length=length)[0] == status


def test_uploads_hold_so_much_of_the_disk_and_no_more():
    from wan.serve.page.guard import API, Guard, Refused

    guard = Guard(None, "127.0.0.1", (), list, lambda: 900, 500, 1000)
    scope = {"type": "http", "method": "POST", "path": f"{API}upload", "server": ("127.0.0.1", 80), "headers": []}
    headers = {"cookie": f"wan_page_80={guard._token}"}
    assert guard._check_body(scope, headers | {"content-length": "100"}) == 100
    with pytest.raises(Refused, match="as many uploaded files as it may"):
        guard._check_body(scope, headers | {"content-length": "101"})


SPELLED = ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/", "/svelte/",
           "/gradio_api/proxy=", "/gradio_api/custom_component/1/client/component/", "/jobs/", "/jobs/x/")  # fmt: skip


def test_nothing_is_served_but_what_the_page_shows(page):
    assert page.generate("shown") == 200
    assert "Made in " in page.follow("shown")
    told = page.run("look", "somebody else")
    [job] = page.queue.list("", limit=1).jobs
    files = {what: page.ask("GET", f"/jobs/{job.id}/{what}") for what in ("video", "thumbnail", "settings")}
    assert {what: answer[0] for what, answer in files.items()} == dict.fromkeys(files, 200)
    assert job.id in told
    assert [answer[1]["Content-Type"] for answer in files.values()] == ["image/png", "image/webp", "application/json"]
    for _, headers, _ in files.values():
        assert (headers["X-Content-Type-Options"], headers["Cache-Control"]) == ("nosniff", "private")
    # As players ask, which then can jump.
    assert page.ask("GET", f"/jobs/{job.id}/video", Range="bytes=0-3")[0] == 206
    folder, shared = page.queue.files.folder, files["settings"][2]
    for secret in (str(folder), str(page.checkpoint), str(page.checkpoint.parent)):
        assert secret not in told + shared + page.ask("GET", "/config")[2] + page.ask("GET", "/")[2]
    assert json.loads(shared)["settings"]["checkpoint"] == page.checkpoint.name
    made = [str(path) for path in (folder / job.id).iterdir()] + [str(folder / "jobs.sqlite")]
    up = [f"{job.id}/../{job.id}/video", f"{job.id}/../jobs.sqlite", f"{job.id}/video.json", "../" * 9 + "etc/passwd"]
    for path in (*made, *up, "/etc/passwd", str(page.checkpoint / "config.json"), "http://127.0.0.1/", "app.py", ""):
        for route in SPELLED:
            for spelled in (path, quote(path, safe=""), quote(quote(path, safe=""))):
                status, _, text = page.ask("GET", f"{route}{spelled}")
                assert status in (400, 403, 404) and "root:" not in text, (route, spelled, status)
    for path in (
        "/gradio_api/deep_link",
        "/gradio_api/component_server",
        "/monitoring",
        "/login",
        "/docs",
        "/openapi.json",
    ):
        assert page.ask("GET", path)[0] == 404


def test_jobs_of_others_are_neither_shown_nor_deleted(page):
    wish = Wish("nano", {"prompt": "somebody's secret", "checkpoint": "/no/such/checkpoint"}, source="10.0.0.9")
    jobs = [
        *page.queue.submit([wish]),
        *page.queue.submit([replace(wish, owner="0123456789abcdef", source="127.0.0.1")]),
    ]
    for job in jobs:
        for does in ("open", "delete"):
            told = page.run("use", "curious", does=does, job=job.id)
            assert job.id not in told and "secret" not in told and page.queue.get(job.id, job.wish.owner) is not None
        for what in ("video", "settings", "preview", "thumbnail"):
            assert page.ask("GET", f"/jobs/{job.id}/{what}")[0] == 404
        page.queue.remove(job.id)


@pytest.mark.parametrize("given", ({"does": "open", "job": ["x"]}, {"does": {}}, {"does": "delete", "job": "../.."}))
def test_clicks_that_nobody_made_do_nothing(page, given):
    before = [job.id for job in page.queue.list("", limit=300).jobs]
    assert "Ready" in page.run("use", f"clicks-{len(str(given))}", **given)
    assert [job.id for job in page.queue.list("", limit=300).jobs] == before


def test_a_job_is_shown_and_deleted_by_another_session_of_its_address_and_its_files_go(page):
    assert page.generate("first") == 200 and "Made in " in page.follow("first")
    [job] = page.queue.list("", limit=1).jobs
    assert "Made in " in page.run("use", "second", does="open", job=job.id)
    assert page.ask("POST", f"/jobs/{job.id}/video", b"")[0] == 404
    page.run("use", "second", does="delete", job=job.id)
    assert page.ask("GET", f"/jobs/{job.id}/video")[0] == 404 and not (page.queue.files.folder / job.id).exists()
    assert "no longer there" in page.run("look", "first")


@pytest.mark.parametrize(
    "change, said",
    (
        ({"size": "16384x16384"}, "size 16384x16384 is larger than is made here"),
        ({"steps": 901}, ""),
        ({"frames": 4093}, ""),
        ({"frames": 1e308}, ""),
        ({"seed": "9" * 5000}, "is not a whole number"),
        ({"algorithm": "sta-" + "9" * 5000}, ""),
        ({"lora": ["../../etc/passwd"]}, ""),
    ),
)
def test_values_beyond_the_limits_are_refused_in_raw_calls(page, change, said):
    session = f"large-{abs(hash(str(change)))}"
    assert page.generate(session, **change) in (200, 422)
    told = page.hear(session)
    assert said in told and "Made in" not in told and "Step" not in told and len(told) < 20_000


@pytest.mark.parametrize(
    "section, values, said",
    (
        ("video", {"size": "16384*16384", "frame_num": 5}, "size 16384x16384 is larger than is made here"),
        ("video", {"size": "32*32", "frame_num": 4093}, "4093 frames are more than are made here; use up to 241"),
        ("sampling", {"steps": 901}, "901 steps are more than are taken here; use up to 900"),
        ("cache", "mag:0.06:/etc/hostname", "cache names a file of ratios"),
        ("cache", {"kind": "mag", "ratios": "/no/such/file"}, "cache names a file of ratios"),
    ),
)
def test_values_beyond_the_limits_are_refused_in_records(page, section, values, said):
    record = json.dumps({"settings": {"prompt": "x", section: values}}).encode()
    assert said in page.give("load", page.upload(record, "x.json"), f"record-{section}-{len(str(values))}")


def picture(colour: str = "red") -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (64, 32), colour).save(written, "PNG")
    return written.getvalue()


def test_a_picture_is_shown_used_and_named_but_not_served(page, monkeypatch):
    seen = []
    make = WanT2V.generate

    def remembered(self, prompt, image=None, **values):
        seen.append(image)
        return make(self, prompt, **values)

    monkeypatch.setattr(WanT2V, "generate", remembered)
    family = replace(
        WAN,
        kinds_of=lambda layout: frozenset({"text", "pictured"}),
        inputs_of=lambda layout, kind: MediaInputs(optional=frozenset({"image"})),
        fit_size=lambda layout, given, asked: (64, 32),
    )
    monkeypatch.setattr(recognition, "FAMILIES", (family,))
    path = page.upload(picture(), "cat.png")
    told = page.give("begin", path, "pictured")
    assert "Begins with cat.png" in told and page.ask("GET", f"/gradio_api/file={quote(path)}")[0] == 403
    shown = [one for one in re.findall(r'"path":"([^"]+)"', told) if one != path]
    assert shown and all(page.ask("GET", f"/gradio_api/file={quote(one)}")[0] == 200 for one in shown)
    assert page.generate("pictured") == 200
    told = page.follow("pictured")
    assert "Made in " in told and "64x32" in told and seen[0].shape == (32, 64, 3)
    [job] = page.queue.list("", limit=1).jobs
    shared = json.loads(page.ask("GET", f"/jobs/{job.id}/settings")[2])
    assert shared["settings"]["image"] == "image.png" == shared["made_with"]["image"]["name"]
    assert page.queue.files.read(job.id, "image.png") == picture() and path not in json.dumps(job.wish.layer)


def test_a_picture_is_a_visitor_s_upload_and_nothing_else(page, tmp_path, monkeypatch):
    (tmp_path / "private.png").write_bytes(picture())
    (page.queue.files.folder / "private.png").write_bytes(picture())
    for number, path in enumerate((tmp_path / "private.png", page.queue.files.folder / "private.png", "/etc/hostname")):
        told = page.give("begin", str(path), f"path-{number}")
        assert "Begins with" not in told and "process_completed" in told and "pixels" not in told
    for name, content, said in (
        ("text.png", b"<svg onload=alert(1)>", "image text.png is no picture that can be read"),
        ("cut.png", picture()[:60], "image cut.png is damaged"),
        ("x.json", b"{}", ""),
    ):
        told = page.give("begin", page.upload(content, name), f"file-{name}")
        assert said in told and "Begins with" not in told
    monkeypatch.setattr(pictures, "MAX_PICTURE_BYTES", 20)
    told = page.give("begin", page.upload(picture("blue"), "cat.png"), "large")
    assert "cat.png is larger than 0 MB; save it smaller" in told


def test_a_picture_for_what_takes_none_is_refused_when_a_video_is_asked_for(page):
    assert "Begins with" in page.give("begin", page.upload(picture("green"), "cat.png"), "none")
    assert page.generate("none") == 200
    told = page.follow("none")
    assert "image image.png is not taken by t2v" in told and "Made in" not in told


def test_a_preset_beyond_the_limits_is_shown_within_them_and_says_so():
    from wan.serve.page.form import to_form
    from wan.serve.page.layout import within

    form_of = to_form(resolve({"prompt": "x", "checkpoint": "x", "video": {"frame_num": 81}}))
    fitting, note = within(form_of, Limits(frames=20, steps=8))
    assert (fitting.frame_num, fitting.steps) == (17, 8) and note == "This page makes up to 20 frames in 8 steps."
    assert within(form_of, Limits()) == (form_of, "")


def test_a_body_that_is_large_is_not_read(page):
    assert page.ask("POST", "/gradio_api/queue/join", b"", **JSON, Content_Length=str(1 << 40))[0] == 413
    assert page.ask("POST", "/gradio_api/queue/join", b"", **JSON, Content_Length=None)[0] == 411


def test_a_visitor_of_50_jobs_keeps_nobody_out_and_cancel_ends_them_all(page, monkeypatch):
    known = page.event("generate")
    monkeypatch.setattr(Served, "event", lambda *_: known)
    for number in range(50):
        assert page.generate("greedy", steps=900, frames=17, size="64x64", prompt=f"flood {number}") == 200
    page.until(lambda: len(page.going("flood")) == 5)
    assert page.generate("honest") == 200
    page.until(lambda: page.going("A red circle"))
    page.run("cancel", "other")
    assert len(page.going("flood")) == 5
    page.run("cancel", "greedy")
    assert "Made in " in page.follow("honest")
    assert not page.going("")


def test_an_error_of_our_own_is_a_line_and_leaves_the_page_usable(page, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr("wan.serve.workers.maker.make_frames", lambda *_, **__: 1 / 0)
        assert page.generate("unlucky") == 200
        assert "ZeroDivisionError: division by zero" in page.follow("unlucky")
    assert "Traceback" in capfd.readouterr().err
    assert page.generate("unlucky") == 200 and "Made in " in page.follow("unlucky")


def test_limits_cover_the_presets_unless_the_operator_says_less():
    large = resolve({"prompt": "x", "checkpoint": "x", "sampling": {"steps": 200}, "video": {"size": "1920*1088"}})
    assert Limits.of({}, [large]) == Limits(pixels=1920 * 1088, steps=200)
    assert Limits.of({"steps": 8, "frames": None}, [large]).steps == 8
    with pytest.raises(InputError, match="limit of frames 0 is not a positive whole number"):
        Limits.of({"frames": 0}, [large])


def test_folders_of_the_server_are_left_out_of_what_is_said():
    said = f"{Path.home()}/private things/model.safetensors is truncated"
    assert "private" not in without_folders("/srv/private/model.safetensors is truncated")
    assert str(Path.home()) not in without_folders(said)
    assert without_folders("'/srv/a/b.json' (see /etc/x)") == "'b.json' (see x)"
    kept = "Runs Wan-AI/Wan2.1, 1.5/2 at 64x48; and/or https://example.org/a/b"
    assert without_folders(kept) == kept
    lora = [{"file": "/srv/loras/a.safetensors", "scale": 1.0}]
    shared = sidecar_to_share(
        {"settings": {"checkpoint": "/srv/nano", "transformer": "/srv/w.safetensors", "lora": lora}}
    )
    assert "/srv" not in shared and json.loads(shared)["settings"]["lora"][0]["file"] == "a.safetensors"
