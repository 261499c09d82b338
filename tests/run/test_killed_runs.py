"""Runs that are killed at any moment, and disks that fill up: nothing broken, nothing lost, the next run goes on."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from imageio_ffmpeg import count_frames_and_secs
from places import PROGRAMS, ROOT
from starting import Forked, finish

from wan.files.hashes import file_hash

LIMITED = PROGRAMS / "small_disk.py"
FRAMES = 9
SMALL = f"--size 96*96 --frame_num {FRAMES} --sample_steps 1 --sample_guide_scale 1 --base_seed 1 --device cpu".split()
KILLS, COUNT = 20, 24
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def command(random_nano, tmp_path):
    """Make the videos of a prompt file in `tmp_path / "made"`."""
    (tmp_path / "prompts.txt").write_text("".join(f"A cat number {number}\n" for number in range(COUNT)))
    return ["--prompt_file", "prompts.txt", "--save_dir", "made", "--ckpt_dir", random_nano, *SMALL]


def finished(folder: Path) -> dict[str, str]:
    """Digests of the videos of a folder by name, each of them whole; a record may wait for its own."""
    found = {}
    for path in folder.glob("*.mp4"):
        found[path.name] = file_hash(path)
        assert count_frames_and_secs(path)[0] == FRAMES
        assert json.loads(path.with_suffix(".json").read_text())["file"] == {
            "name": path.name,
            "sha256": found[path.name],
        }
    return found


def kept(before: dict[str, str], now: dict[str, str]) -> bool:
    return before.items() <= now.items()


def test_runs_killed_at_random_moments_lose_nothing_and_the_next_makes_what_is_missing(command, tmp_path):
    draw, made, folder = random.Random(0), {}, tmp_path / "made"
    hits = 0
    for number in range(KILLS):
        run = Forked(ROOT / "generate.py", *command, cwd=tmp_path)
        while not run.has_begun():
            time.sleep(0.01)
        # Before that the program that runs is Python's own, with its own way to end.
        end = time.monotonic() + draw.uniform(0.1, 0.9)
        while time.monotonic() < end and run.poll() is None:
            time.sleep(0.01)
        if run.poll() is None:
            os.kill(run.pid, SIGNALS[number % len(SIGNALS)])
            hits += 1
        _, _, said = finish(run, seconds=60)
        assert "Traceback" not in said
        now = finished(folder) if folder.exists() else {}
        assert kept(made, now)
        made = now
    # Those left over are made in one go, beside any that all kills spared.
    code, _, said = finish(Forked(ROOT / "generate.py", *command, cwd=tmp_path), seconds=60)
    assert code == 0 and f"prompts: {COUNT}, of which {len(made)} are made already" in said
    assert kept(made, finished(folder)) and len(finished(folder)) == COUNT and hits
    assert not list(folder.glob(".partial-*"))


def is_written(folder: Path) -> bool:
    """Whether a video is being written to a folder, no trial of whether one could be."""
    try:
        return any("trial" not in one.name for one in folder.glob(".partial-*/*"))
    except FileNotFoundError:
        # A folder of a trial that has gone since it was listed.
        return False


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGHUP, signal.SIGINT))
def test_a_signal_while_a_video_is_written_leaves_nothing_of_it(command, tmp_path, number):
    command[command.index("--frame_num") + 1] = "33"
    run = Forked(ROOT / "generate.py", *command, cwd=tmp_path)
    while run.poll() is None and not is_written(tmp_path / "made"):
        time.sleep(0.002)
    os.kill(run.pid, number)
    code, _, said = finish(run, seconds=60)
    assert code == 128 + number and "no half-written file is left" in said.splitlines()[-1]
    assert list((tmp_path / "made").iterdir()) == []


@pytest.mark.parametrize("limit", (500, 2_000, 6_000, 9_000, 12_000))
def test_a_disk_that_fills_up_is_one_line_and_what_was_there_stays(command, tmp_path, limit):
    """A limit on the size of files stands for the disk, from too little for a record to nearly enough for a video."""
    assert (
        finish(Forked(ROOT / "generate.py", *command[4:], "--prompt", "x", "--save_file", "x.mp4", cwd=tmp_path))[0]
        == 0
    )
    before = {path: path.read_bytes() for path in tmp_path.glob("x.*")}
    code, _, said = finish(Forked(LIMITED, limit, *command, cwd=tmp_path), seconds=60)
    assert code == 2 and re.search(r"(?m)^error: .*(cannot|could not) be written", said) and "Traceback" not in said
    assert list((tmp_path / "made").iterdir()) == [] and len(before) == 2
    code, _, said = finish(
        Forked(LIMITED, limit, *command[4:], *"--prompt y --save_file x.mp4 --overwrite".split(), cwd=tmp_path)
    )
    assert code == 2 and {path: path.read_bytes() for path in tmp_path.glob("x.*")} == before
