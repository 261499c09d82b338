"""The API attacked: by those who may not ask, by what is too much, and by files that are not what they seem."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from PIL import Image
from served_api import TINY, Served, serve

from nabla import InputError
from wan.serve.api import bodies, connections
from wan.serve.api.access import Tokens
from wan.serve.limits import Limits, read_limits

OURS, THEIRS = "our-token-1234567", "their-token-12345"
LIMITS = {"waiting": 8, "waiting_of_source": 5, "upload_mb": 1, "picture_pixels": 64 * 64, "steps": 4, "frames": 9,
          "pixels": 64 * 64, "prompt_characters": 100}  # fmt: skip


@pytest.fixture(scope="module")
def server(random_nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("attacked")
    with serve(folder, random_nano, Tokens([OURS, THEIRS]), LIMITS, body_seconds=1) as served:
        yield served


@pytest.fixture
def served(server: Served) -> Iterator[Served]:
    """The server without jobs, which nothing has been left in after the test."""
    yield server
    queue = server.service.queue
    for token in (OURS, THEIRS):
        owner = server.service.tokens.owner(f"Bearer {token}")
        for job in queue.list(owner, limit=100).jobs:
            queue.delete(job.id, owner)
    assert {path.name for path in queue.files.folder.iterdir()} <= {
        "jobs.sqlite",
        "jobs.sqlite-shm",
        "jobs.sqlite-wal",
        "loras",
    }


def bearer(token: str = OURS) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def png(width: int, height: int) -> bytes:
    """A picture of one colour, which is small however large it is."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(b"\0" * (1 + width * 3) * height, 9)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def waiting(served: Served) -> int:
    return sum(served.service.queue.store.count().values())


@pytest.mark.parametrize("token", ["", "Bearer", "Bearer wrong-token-12345", f"Basic {OURS}", f"Bearer {OURS}x"])
@pytest.mark.parametrize("request_line", ["GET /v1/videos", "POST /v1/videos/sync", "GET /metrics", "GET /v1/models"])
def test_without_a_token_there_is_nothing(served: Served, token: str, request_line: str):
    method, path = request_line.split()
    status, said = served.ask(method, path, Authorization=token)
    assert (status, said["error"]["type"]) == (401, "authentication_error")
    with pytest.raises(openai.AuthenticationError):
        served.client("wrong-token-12345").videos.list()


def test_anothers_job_is_not_there(served: Served):
    video = served.client(THEIRS).videos.create(prompt="A circle", extra_body=TINY)
    served.make()
    ours = served.client(OURS).videos
    assert not ours.list().data
    for ask in (ours.retrieve, ours.download_content, ours.delete, lambda one: ours.remix(one, prompt="Mine")):
        with pytest.raises(openai.NotFoundError):
            ask(video.id)
    with pytest.raises(openai.BadRequestError):
        ours.list(after=video.id)
    assert served.ask("GET", f"/v1/videos/{video.id}/events", **bearer())[0] == 404
    # A key is its owner's.
    key = {"Idempotency-Key": "same"}
    made = [
        served.client(one).videos.create(prompt="A", extra_body=TINY, extra_headers=key).id for one in (OURS, THEIRS)
    ]
    assert made[0] != made[1]
    assert served.client(THEIRS).videos.retrieve(video.id).status == "completed"


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1:1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "evil.example", "X-Forwarded-Host": "127.0.0.1"},
    ],
)
def test_pages_of_elsewhere_and_other_names_are_refused(served: Served, headers: dict[str, str]):
    status, said = served.create({}, **bearer() | {name.replace("-", "_"): value for name, value in headers.items()})
    assert (status, said["error"]["type"]) == (403, "permission_error")
    assert not waiting(served)


def test_headers_that_stand_twice_are_refused(served: Served):
    host = f"Host: 127.0.0.1:{served.port}\r\nConnection: close\r\n"
    for twice in (f"Authorization: Bearer {OURS}\r\n" * 2, "Origin: http://127.0.0.1\r\n" * 2):
        assert served.raw(f"GET /v1/videos HTTP/1.1\r\n{host}{twice}\r\n".encode()).startswith(b"HTTP/1.1 403")


# An audit hook stays for good, so what it calls is exchanged.
OPENS = ("open", "os.listdir", "os.scandir", "socket.connect", "socket.getaddrinfo", "pickle.find_class")
told_of = lambda event, given: None  # noqa: E731
sys.addaudithook(lambda event, given: told_of(event, given))


@pytest.mark.parametrize("path", ["/etc/hostname", "file:///etc/hostname", "http://127.0.0.1:1/x", "../jobs.sqlite"])
def test_no_path_and_no_url_is_opened(served: Served, path: str, monkeypatch: pytest.MonkeyPatch):
    opened: list[tuple] = []
    monkeypatch.setattr(
        "test_api_attacks.told_of", lambda event, given: opened.append(given) if event in OPENS else None
    )
    fields = (
        {"input_reference": path, "model": "pictures"},
        {"input_reference": {"image_url": path}, "model": "pictures"},
        {"input_reference": {"file_id": path}, "model": "pictures"},
        {"model": path},
        {"lora": {"name": path}},
        {"size": path},
        {"checkpoint": path},
        {"transformer": path},
        {"vae": path},
        {"image": path},
        {"extra_params": {"checkpoint": path}},
        {"extra_params": {"cache": {"kind": "mag", "ratios": path}}},
        {"extra_params": {"cache": f"mag:0.1:{path}"}},
        {"extra_params": {"attention": {"profile": path}}},
        {"extra_params": {"attention": {"algorithm": f"profile:{path}"}}},
        {"extra_params": {"attention": {"algorithm": path}}},
        {"extra_params": {"attention": {"backend": path}}},
        {"extra_params": path},
    )
    for one in fields:
        status, said = served.create(one, **bearer())
        assert status in (400, 404), one
        assert str(served.service.queue.files.folder) not in json.dumps(said)
    assert opened and not [given for given in opened if path in str(given) or ("127.0.0.1", 1) in given]
    assert not waiting(served)
    for where in (f"/v1/videos/{path}", f"/v1/videos/{path}/content", "/v1/videos/..%2f..%2fetc%2fhostname/content"):
        assert served.ask("GET", where, **bearer())[0] in (400, 404)
    assert served.ask("GET", "/v1/videos?after=" + path, **bearer())[0] == 400


def test_a_body_that_is_too_large_is_not_read(served: Served):
    length = 4 << 20
    head = f"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nAuthorization: Bearer {OURS}\r\n"
    answer = served.raw(f"{head}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode() + b"{")
    assert answer.startswith(b"HTTP/1.1 413") and b"the most is 2 MB" in answer
    # A client that sends somewhat too much hears so.
    with pytest.raises(openai.APIStatusError, match="the most is 2 MB"):
        picture = ("a.png", bytes(3 << 20))
        served.client(OURS).videos.create(prompt="A", model="pictures", input_reference=picture)
    answer = served.raw(f"{head}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 411")


def test_a_body_that_comes_slowly_is_not_waited_for(served: Served):
    head = f"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nAuthorization: Bearer {OURS}\r\n"
    begun = time.monotonic()
    answer = served.raw(f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n".encode() + b'{"prompt"')
    assert answer.startswith(b"HTTP/1.1 408") and time.monotonic() - begun < 5
    answer = served.raw(
        f"{head}Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 100\r\n\r\n--b\r\n".encode()
    )
    assert answer.startswith(b"HTTP/1.1 408")


def test_a_head_that_does_not_come_is_not_waited_for(served: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    assert served.raw() == b""
    assert served.raw(b"GET /health HTTP/1.1\r\nHost: ") == b""
    # The next request of a connection too.
    whole = f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n\r\n".encode()
    assert b'{"status":"ok"}' in served.raw(whole, b"GET /health HT")
    # But one that came together with the one before, and takes long, is.
    video = served.create({}, **bearer())[1]["id"]
    events = whole.replace(b"/health", f"/v1/videos/{video}/events".encode())
    events = events.replace(b"\r\n\r\n", f"\r\nAuthorization: Bearer {OURS}\r\nConnection: close\r\n\r\n".encode())
    threading.Timer(0.8, served.make).start()
    assert b"event: video.completed" in served.raw(whole + events)


def test_many_connections_that_say_nothing_leave_others_served(served: Served):
    silent = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(50)]
    assert served.ask("GET", "/health")[0] == 200
    for one in silent:
        one.close()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (png(10_000, 10_000), "is 10000x10000, of more than 4096 pixels"),
        (png(65, 64), "is 65x64, of more than 4096 pixels"),
        (png(32, 32)[:60], "is damaged"),
        (b"", "is empty"),
        (b"GIF89a" + bytes(100), "is no picture that can be read"),
        (b"\x80\x04\x95" + b"cos\nsystem\n(S'touch /tmp/x'\ntR.", "is no picture that can be read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", "is no picture"),
    ],
)
def test_pictures_that_are_none_or_too_large_are_refused(served: Served, content: bytes, said: str):
    status, answer = served.create({"model": "pictures", "input_reference": data_url(content)}, **bearer())
    assert (status, answer["error"]["param"]) == (400, "input_reference")
    assert said in answer["error"]["message"]
    with pytest.raises(openai.BadRequestError, match=said):
        given = ("/etc/x.png", content)
        served.client(OURS).videos.create(prompt="A", model="pictures", input_reference=given, extra_body=TINY)
    assert not waiting(served)


def test_a_picture_whose_text_unpacks_without_end_is_refused(served: Served):
    bomb = zlib.compress(bytes(100 << 20), 9)
    whole = png(32, 32)
    content = b"text\0\0" + bomb
    chunk = struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    status, answer = served.create(
        {"model": "pictures", "input_reference": data_url(whole[:33] + chunk + whole[33:])}, **bearer()
    )
    assert status in (400, 200), answer
    if status == 200:
        assert answer["status"] == "queued"


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": NaN}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "seconds": 1e999}',
        b'{"prompt": {"a": 1}}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "n": true}',
        b"null",
        b"\xff\xfe",
        b"",
    ],
)
def test_json_that_is_none_is_refused(served: Served, body: bytes):
    status, said = served.ask("POST", "/v1/videos", body, Content_Type="application/json", **bearer())
    assert status == 400 and said["error"]["message"]
    assert not waiting(served)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("extra_params" + "[a]" * 50, "1"),
        ("extra_params[attention", "1"),
        ("lora[name][x]", "1"),
        ("__class__[__init__]", "1"),
        ("", "1"),
    ],
)
def test_forms_that_are_odd_are_refused(served: Served, name: str, value: str):
    parts = {"prompt": "A", "lora[name]": "a", name: value}
    body = "".join(f'--b\r\nContent-Disposition: form-data; name="{one}"\r\n\r\n{parts[one]}\r\n' for one in parts)
    kind = "multipart/form-data; boundary=b"
    assert served.ask("POST", "/v1/videos", f"{body}--b--\r\n".encode(), Content_Type=kind, **bearer())[0] == 400
    kind = "application/x-www-form-urlencoded"
    status, answer = served.ask("POST", "/v1/videos", b"prompt=A&prompt=B", Content_Type=kind, **bearer())
    assert (status, answer["error"]["message"]) == (400, "prompt stands twice in the form; send it once")
    many = "&".join(f"a{number}=1" for number in range(bodies.MOST_FIELDS + 1)).encode()
    assert served.ask("POST", "/v1/videos", many, Content_Type=kind, **bearer())[0] == 400
    assert served.ask("POST", "/v1/videos", b"<a/>", Content_Type="text/xml", **bearer())[0] == 415


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_frames": 13}, "13 frames are more than are made here; use up to 9"),
        ({"seconds": 3600, "num_frames": None}, "57601 frames"),
        ({"size": "128x64"}, "size 128x64 is larger than is made here"),
        ({"num_inference_steps": 5}, "5 steps are more than are taken here; use up to 4"),
        ({"prompt": "a" * 101}, "prompt has 101 characters; use up to 100"),
        ({"negative_prompt": "a" * 101}, "negative_prompt has 101 characters"),
    ],
)
def test_the_operators_limits_hold(served: Served, fields: dict, said: str):
    status, answer = served.create(fields, **bearer())
    assert (status, said in answer["error"]["message"]) == (400, True), answer
    assert not waiting(served)


def test_a_full_queue_takes_no_more(served: Served):
    status = [served.create({"input_reference": None}, **bearer())[0] for _ in range(20)]
    assert status == [200] * 5 + [429] * 15
    with pytest.raises(openai.RateLimitError) as error:
        served.client(OURS).videos.create(prompt="A", extra_body=TINY)
    assert (error.value.code, int(error.value.response.headers["retry-after"]) > 0) == ("queue_full", True)
    # Others still may, until all places are taken.
    assert [served.create({}, **bearer(THEIRS))[0] for _ in range(5)] == [200] * 3 + [429] * 2
    assert served.create({"n": 5}, **bearer(THEIRS))[0] == 429
    assert waiting(served) == 8
    folders = [path for path in served.service.queue.files.folder.iterdir() if path.name.startswith("video_")]
    assert len(folders) <= 8


def test_those_who_wait_are_limited(served: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wan.serve.api.service.MOST_LISTENING", 1)
    video = served.client(OURS).videos.create(prompt="A", extra_body=TINY)
    head = f"GET /v1/videos/{video.id}/events HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\nConnection: close\r\n"
    first = threading.Thread(target=served.raw, args=(f"{head}Authorization: Bearer {OURS}\r\n\r\n".encode(),))
    first.start()
    until = time.monotonic() + 5
    while served.service._listening == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert served.ask("GET", f"/v1/videos/{video.id}/events", **bearer())[0] == 429
    served.client(OURS).videos.delete(video.id)
    first.join(timeout=10)
    assert served.service._listening == 0


def test_tokens_are_read_from_a_file(tmp_path: Path):
    file = tmp_path / "tokens"
    file.write_text(f"# the team's\n{OURS}\n\n  {THEIRS}  \n")
    tokens = Tokens.read(file)
    assert len({tokens.owner(f"Bearer {one}") for one in (OURS, THEIRS)}) == 2
    for content, said in (("# none\n", "holds no token"), ("short", "a token of 5 characters"), ("ü" * 20, "ASCII")):
        file.write_text(content)
        with pytest.raises(InputError, match=said):
            Tokens.read(file)
    with pytest.raises(InputError, match="cannot be read"):
        Tokens.read(tmp_path / "none")


def test_limits_are_read_from_a_file(tmp_path: Path):
    file = tmp_path / "limits.yaml"
    file.write_text("frames: 121\nwaiting: 3\n")
    assert Limits(**read_limits(file)) == Limits(frames=121, waiting=3)
    for content, said in (
        ("frame: 1", "unknown key 'frame'; allowed are frames"),
        ("- 1", "does not hold a mapping"),
        ("a: [", "cannot be read"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=said):
            read_limits(file)
    with pytest.raises(InputError, match="limit of frames 'many' is not a positive whole number"):
        Limits(frames="many")


def test_a_picture_that_is_taken_keeps_nothing_of_its_name(served: Served):
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "JPEG")
    name = ("../../../tmp/evil.svg\r\nX: y", file.getvalue())
    video = served.client(OURS).videos.create(prompt="A", model="pictures", input_reference=name, extra_body=TINY)
    folder = served.service.queue.files.folder / video.id
    assert [path.name for path in folder.iterdir()] == ["image.jpg"]
