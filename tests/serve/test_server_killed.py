"""The whole server, killed again and again while many clients ask it.

As a script it is serve.py with the small model, and much more of all:
PYTHONPATH=.:tests python tests/serve/test_server_killed.py
"""

from __future__ import annotations

import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPException
from pathlib import Path

from running_server import Answer, Server, serve_forked, serve_program

SMALL = {"size": "16x16", "num_frames": 5, "num_inference_steps": 2}


def ask_until_answered(server: Server, *request: object, **headers: str) -> Answer:
    """As clients do while a server is started again, or has no room."""
    while True:
        try:
            answer = server.ask(*request, **headers)
        except (OSError, HTTPException):
            time.sleep(0.1)
            continue
        if answer.status < 500 and answer.status != 429:
            return answer
        time.sleep(min(1, int(answer.headers.get("Retry-After", 1))))


def make_videos(server: Server, client: int, number: int, look_seconds: float) -> list[str]:
    """Ask for some videos, see each through to its end, and give their ids."""
    ids = []
    for one in range(number):
        wish = SMALL | {"prompt": f"A red circle of client {client}", "seed": 1000 * client + one}
        # What is sent again, since its answer was lost, is one job by its key.
        answer = ask_until_answered(server, "POST", "/v1/videos", wish, **{"Idempotency-Key": f"{client}-{one}"})
        assert answer.status == 200, answer
        ids.append(answer.json["id"])
    for one in ids:
        while (video := ask_until_answered(server, "GET", f"/v1/videos/{one}").json)["status"] != "completed":
            assert video["status"] in ("queued", "in_progress"), video
            time.sleep(look_seconds)
        assert ask_until_answered(server, "GET", f"/v1/videos/{one}/content").status == 200
    return ids


def listed(server: Server, limit: int = 100) -> list[dict]:
    """All videos of the server's list, by its pages of so many."""
    found: list[dict] = []
    more = True
    while more:
        after = f"&after={found[-1]['id']}" if found else ""
        page = server.ask("GET", f"/v1/videos?limit={limit}&order=asc{after}").json
        found += page["data"]
        more = page["has_more"]
    return found


def kill_meanwhile(server: Server, kills: int, total: int, look_seconds: float) -> None:
    """Kill the server and start it again, spread over the work."""
    for kill in range(1, kills + 1):
        while sum(one["status"] == "completed" for one in listed(server)) < total * kill // (kills + 1):
            time.sleep(look_seconds)
        server.end(signal.SIGKILL)
        server.start()


def run(server: Server, clients: int, each: int, kills: int, look_seconds: float) -> None:
    total, begin = clients * each, time.monotonic()
    with ThreadPoolExecutor(clients + 1) as threads:
        killer = threads.submit(kill_meanwhile, server, kills, total, look_seconds)
        asked = [threads.submit(make_videos, server, client, each, look_seconds) for client in range(clients)]
        killer.result()
        ids = [one for client in asked for one in client.result()]
    videos = listed(server, 7)
    assert len(set(ids)) == total and sorted(one["id"] for one in videos) == sorted(ids)
    assert {(one["status"], one["progress"]) for one in videos} == {("completed", 100)}
    assert len({one["seed"] for one in videos}) == total
    print(f"{total} videos of {clients} clients in {time.monotonic() - begin:.0f} s, with {kills} kills")


def test_no_job_is_lost_or_doubled_by_a_server_that_is_killed(tmp_path, random_nano):
    with Server(partial(serve_forked, tmp_path, random_nano)) as server:
        run(server, clients=4, each=5, kills=3, look_seconds=0.05)


def measure_memory(server: Server, requests: int) -> list[float]:
    """What the server holds at first and after each tenth of requests, some of each kind."""
    held = [server.memory()]
    for number in range(requests):
        if number % 5 == 0:
            video = server.ask("POST", "/v1/videos", SMALL | {"prompt": "A red circle"}).json["id"]
        elif number % 5 == 4:
            assert server.ask("DELETE", f"/v1/videos/{video}").status == 200
        else:
            path = ("", f"/v1/videos/{video}", "/v1/videos", "/metrics")[number % 5]
            assert server.ask("GET", path).status == 200
        if (number + 1) % (requests // 10) == 0:
            held.append(server.memory())
    return held


def test_a_server_does_not_grow_with_what_it_is_asked(tmp_path, random_nano):
    with Server(partial(serve_forked, tmp_path, random_nano)) as server:
        held = measure_memory(server, 200)
    assert held[-1] < held[5] + 4, held


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        with Server(partial(serve_program, Path(place) / "killed")) as started:
            run(started, clients=20, each=10, kills=5, look_seconds=3)
        with Server(partial(serve_program, Path(place) / "memory")) as started:
            print("MB:", *(f"{one:.1f}" for one in measure_memory(started, 1000)))
