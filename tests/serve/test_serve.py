"""The server as a program of its own, with a model, driven by OpenAI's client and by ours."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from places import ROOT

import serve
from nabla import InputError
from wan import client

SMALL = {"size": "32x32", "num_frames": 5, "num_inference_steps": 2, "seed": 3}


def start(folder: Path, checkpoint: Path) -> tuple[subprocess.Popen, str]:
    """A server of a folder, and its address."""
    command = [sys.executable, "serve.py", "--ckpt_dir", checkpoint, "--save_dir", folder, "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.match(r"server: (\S+)/v1", line):
            return process, found[1]
    raise AssertionError("".join(said))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "jobs"


@pytest.fixture
def url(folder: Path, random_nano: Path) -> Iterator[str]:
    process, address = start(folder, random_nano)
    yield address
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM


def test_a_server_makes_videos(url: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    api = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    video = api.videos.create(prompt="A red circle", extra_body=SMALL)
    running = api.videos.create(prompt="A red circle", extra_body=SMALL | {"num_inference_steps": 100})
    file = tmp_path / "video.mp4"
    # The same video as the first, by our own client.
    flags = ["--num_frames", "5", "--num_inference_steps", "2", "--seed", "3", "--size", "32x32"]
    until = time.monotonic() + 120
    while api.videos.retrieve(video.id).status != "completed" and time.monotonic() < until:
        time.sleep(0.1)
    made = api.videos.retrieve(video.id)
    assert (made.status, made.size, made.seed) == ("completed", "32x32", 3), made
    content = api.videos.download_content(video.id).read()
    assert content[4:8] == b"ftyp"
    assert api.videos.download_content(video.id, variant="thumbnail").read()[8:12] == b"WEBP"
    assert api.videos.delete(running.id).deleted
    assert client.main(["A red circle", "--url", url, "--save_file", str(file), *flags]) == 0
    assert file.read_bytes() == content
    assert capfd.readouterr().out.strip() == str(file)
    # What a server refuses is said in a line.
    assert client.main(["A red circle", "--url", url, "--size", "33x33"]) == 2
    assert "error: size 33x33: both must be positive multiples" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        client.main(["A red circle", "--extra_params", "{"])
    assert "argument --extra_params: '{' is not a JSON object" in capfd.readouterr().err
    # Another server of the folder would make the same videos.
    assert serve.main(["--save_dir", str(folder), "--port", "0"]) == 2
    assert "is in use by another run" in capfd.readouterr().err


def test_the_client_takes_no_other_file_s_place(tmp_path: Path, capfd: pytest.CaptureFixture):
    file = tmp_path / "cats.mp4"
    file.write_bytes(b"mine")
    # Nobody is asked: there is no server at this port.
    asked = ["Cats", "--url", "http://127.0.0.1:9", "--save_file", str(file)]
    assert client.main(asked) == 2
    assert "is there already; give --overwrite" in capfd.readouterr().err
    assert client.main([*asked, "--overwrite"]) == 2
    assert "cannot be asked" in capfd.readouterr().err
    assert file.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config", "none.yaml"], "config 'none.yaml' is neither a file nor one of"),
        (["--api_key_file", "none"], "api_key_file none cannot be read"),
        (["--limits", "none.yaml"], "limits none.yaml cannot be read"),
        (["--allowed_host", "a b"], "allowed_host 'a b' is not a host"),
        (["--host", "203.0.113.7"], "port 8000 of 203.0.113.7 cannot be served (Cannot assign requested address)"),
        (["--device", "cuda:99"], "device 'cuda:99' is not here"),
        (["--device", "odd"], "device 'odd' is not known"),
        (["--ckpt_dir", "none"], "checkpoint 'none' is neither a directory nor a hub id"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(
    flags: list[str], said: str, tmp_path: Path, random_nano: Path, capfd: pytest.CaptureFixture
):
    usual = ["--save_dir", str(tmp_path), *([] if "--ckpt_dir" in flags else ["--ckpt_dir", str(random_nano)])]
    assert serve.main([*usual, *flags]) == 2
    assert f"error: {said}" in capfd.readouterr().err


def test_without_the_small_checkpoint_it_says_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    monkeypatch.setattr(serve, "SMALL_CHECKPOINT", str(tmp_path / "none"))
    assert serve.main(["--save_dir", str(tmp_path)]) == 2
    assert "give --ckpt_dir, or --config nabla_0.7.yaml for Wan2.1 14B" in capfd.readouterr().err


@pytest.mark.parametrize("flag", [["--keep_for", "7 days"], ["--keep_for", "0h"], ["--port", "many"]])
def test_flags_are_checked_first(flag: list[str]):
    with pytest.raises(SystemExit):
        serve.parse_args(flag)
    assert serve.parse_args(["--keep_for", "1.5d"]).keep_for == 1.5 * 86400


def test_a_client_says_what_is_wrong(tmp_path: Path, capfd: pytest.CaptureFixture):
    assert client.main(["A red circle", "--url", "http://127.0.0.1:9"]) == 2
    assert "error: http://127.0.0.1:9 cannot be asked" in capfd.readouterr().err
    with pytest.raises(InputError, match="cannot be read"):
        client.fields_of(client.parse_args(["A", "--image", str(tmp_path / "none.png")]))
    fields = client.fields_of(client.parse_args(["A", "--lora", "style:0.5", "--seconds", "2", "--seed", "1"]))
    assert fields == {"prompt": "A", "lora": {"name": "style", "scale": "0.5"}, "seconds": 2.0, "seed": 1}
