"""Ask a server of videos, see serve.py, for one: python -m wan.client "a red circle moves from left to right" """

from __future__ import annotations

import argparse
import base64
import json
import mimetypes
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from wan.observe.console import EndedBySignal, exit_with, log_to_stderr, run_program, say
from wan.run.flags import Parser

POLL_SECONDS, ANSWER_SECONDS = 0.5, 120
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Flags that are fields of a request.
FIELDS: dict[str, dict[str, Any]] = {
    "model": {"help": "a name that GET /v1/models lists (default: the server's first)"},
    "size": {"help": "widthxheight in pixels, such as 1280x720"},
    "seconds": {"type": float, "help": "length; or --num_frames"},
    "num_frames": {"type": int, "help": "frames, 4n+1"},
    "fps": {"type": int},
    "negative_prompt": {"help": "what the video should not show"},
    "num_inference_steps": {"type": int},
    "guidance_scale": {"type": float, "help": "1 turns guidance off"},
    "flow_shift": {"type": float},
    "seed": {"type": int},
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m wan.client", description=__doc__)
    parser.add_argument("prompt", help="what the video shows")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: http://127.0.0.1:8000)")
    parser.add_argument("--api_key_file", type=Path, metavar="FILE", help="whose first line is the token")
    parser.add_argument("--save_file", type=Path, help="output (default: the video's id and .mp4)")
    parser.add_argument("--overwrite", action="store_true", help="let it take the place of a file that is there")
    for name, options in FIELDS.items():
        parser.add_argument(f"--{name}", **options)
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture that the video begins with")
    parser.add_argument("--lora", metavar="NAME[:SCALE]", help="a LoRA file of the server")
    parser.add_argument("--extra_params", type=_mapping, metavar="JSON", help="attention and cache, as in configs/")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    log_to_stderr()
    return run_program(run, args, interrupted="interrupted; the video is not made")


def run(args: argparse.Namespace) -> None:
    """Have a video made, say how far it is, and save it. Raises `InputError` also for a file that is there."""
    from nabla import InputError

    # Before minutes are spent on what could not be kept.
    if args.save_file is not None and args.save_file.exists() and not args.overwrite:
        raise InputError(f"{args.save_file} is there already; give --overwrite, or choose another --save_file")
    server = Server(args.url, args.api_key_file)
    video = server.ask("POST", "/v1/videos", fields_of(args))
    try:
        video = watch(server, video)
    except (KeyboardInterrupt, EndedBySignal):
        # Nobody waits for it any more, which the server may not be there to hear. One that cannot be asked for a while,
        # as it is started again, goes on with it.
        with suppress(ValueError):
            server.ask("DELETE", f"/v1/videos/{video['id']}")
        raise
    save(server, video, args.save_file)


class Server:
    """Requests to a server, each with the token of a file if there is one. Raises `InputError` as `ask` does."""

    def __init__(self, url: str, api_key_file: Path | None = None):
        self.url = url.rstrip("/").removesuffix("/v1")
        token = None if api_key_file is None else _first_line(api_key_file)
        self.headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        # A proxy of the network has no way to this machine.
        is_here = urlsplit(self.url).hostname in LOOPBACK
        handlers = [urllib.request.ProxyHandler({})] if is_here else []
        self.opener = urllib.request.build_opener(*handlers)

    def ask(self, method: str, path: str, fields: dict[str, Any] | None = None) -> dict[str, Any]:
        """The object of an answer. Raises `InputError`, with what the server says, for all but success."""
        answer: dict[str, Any] = json.loads(self.fetch(method, path, fields))
        return answer

    def fetch(self, method: str, path: str, fields: dict[str, Any] | None = None) -> bytes:
        """The bytes of an answer; raises as `ask` does."""
        from nabla import InputError

        body = None if fields is None else json.dumps(fields).encode()
        headers = self.headers | ({} if body is None else {"Content-Type": "application/json"})
        try:
            request = urllib.request.Request(self.url + path, body, headers, method=method)
            with self.opener.open(request, timeout=ANSWER_SECONDS) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            raise InputError(_said(error)) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise InputError(f"{self.url} cannot be asked ({reason}); start one with 'python serve.py'") from None


def fields_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a request, of those flags that were given."""
    given = {name: getattr(args, name) for name in ("prompt", *FIELDS, "extra_params")}
    if args.image is not None:
        kind = mimetypes.guess_type(args.image.name)[0] or ""
        # What is no picture, the server tells by its content.
        kind = kind if kind.startswith("image/") else "image/png"
        given["input_reference"] = f"data:{kind};base64,{base64.b64encode(_content(args.image)).decode()}"
    if args.lora is not None:
        name, _, scale = args.lora.partition(":")
        given["lora"] = {"name": name, "scale": scale or 1.0}
    return {name: value for name, value in given.items() if value is not None}


def watch(server: Server, video: dict[str, Any]) -> dict[str, Any]:
    """A video once it is completed; raises `InputError` if it fails."""
    from nabla import InputError

    last = ""
    while video["status"] in ("queued", "in_progress"):
        if (text := describe(video)) != last:
            say(last := text)
        time.sleep(POLL_SECONDS)
        video = server.ask("GET", f"/v1/videos/{video['id']}")
    if video["error"] is not None:
        raise InputError(f"{video['id']}: {video['error']['message']}")
    return video


def describe(video: dict[str, Any]) -> str:
    """How far a video is, as a line."""
    if video["status"] == "queued":
        ahead = video.get("jobs_ahead")
        return f"{video['id']}: queued" + (f", {ahead} before it" if ahead else "")
    left = video.get("seconds_left")
    return f"{video['stage'] or 'in progress'}: {video['progress']}%" + ("" if left is None else f", {left:.0f} s left")


def save(server: Server, video: dict[str, Any], path: Path | None) -> None:
    """Write a completed video to a file, by default one that is named by its id."""
    from wan.files.atomic import atomic_path

    path = path or Path(f"{video['id']}.{'mp4' if video['num_frames'] > 1 else 'png'}")
    content = server.fetch("GET", f"/v1/videos/{video['id']}/content")
    with atomic_path(path) as partial:
        partial.write_bytes(content)
    say(f"made in {video['inference_time_s']:.1f} s")
    print(path)


def _said(error: urllib.error.HTTPError) -> str:
    """What a server says of a request that it refused."""
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(error.read())["error"]["message"])
    return f"{error.url} answered {error.code} {error.reason}"


def _content(path: Path) -> bytes:
    from nabla import InputError

    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None


def _mapping(text: str) -> dict[str, Any]:
    with suppress(ValueError):
        if isinstance(value := json.loads(text), dict):
            return value
    usual = '{"cache": {"kind": "taylorseer"}}'
    raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, such as {usual!r}")


def _first_line(path: Path) -> str:
    return _content(path).decode("latin-1").split("\n", 1)[0].strip()


if __name__ == "__main__":
    exit_with(main(sys.argv[1:]))
