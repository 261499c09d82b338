"""VACE's videos, and those whose tokens have timesteps of their own, on several processes on a CPU, over gloo."""

from __future__ import annotations

import json

import pytest
from places import PROGRAMS
from starting import finish, fork


@pytest.mark.parametrize("count, layouts", ((2, 2), (4, 1)))
def test_every_layout_gives_the_latents_of_one_process(count, layouts, tmp_path):
    code, out, said = finish(fork(count, PROGRAMS / "vace_layouts.py", cwd=tmp_path), seconds=180)
    assert code == 0, said
    results = [json.loads(line) for line in out.splitlines()]
    assert len(results) == 6 * layouts
    for result in results:
        assert result["error"] < 1e-5, result
        sharded = result["case"][2] == "sharded"
        assert result["held"] < 0.7 if sharded else result["held"] == 1, result
