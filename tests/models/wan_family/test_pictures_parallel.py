"""Wan's videos from pictures on several processes on a CPU, over gloo, of which one alone encodes what is given."""

from __future__ import annotations

import json

from picture_pipelines import KINDS
from places import PROGRAMS
from starting import finish, fork


def test_every_layout_gives_what_one_process_gives(tmp_path):
    code, out, said = finish(fork(2, PROGRAMS / "picture_layouts.py", cwd=tmp_path), seconds=120)
    assert code == 0, said
    results = [json.loads(line) for line in out.splitlines()]
    assert len(results) == 2 * len(KINDS)
    for result in results:
        assert result["error"] < 1e-5 and result["same"], result
