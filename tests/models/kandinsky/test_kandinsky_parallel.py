"""Kandinsky-5 on several processes on a CPU, over gloo: every layout gives what one process gives."""

from __future__ import annotations

import json

import pytest
from places import PROGRAMS
from starting import finish, fork


@pytest.mark.parametrize("count", (2, 4))
def test_every_layout_gives_what_one_process_gives(count, tmp_path):
    code, out, said = finish(fork(count, PROGRAMS / "kandinsky_layouts.py", cwd=tmp_path), seconds=300)
    assert code == 0, said
    results = [json.loads(line) for line in out.splitlines()]
    assert len(results) == {2: 11, 4: 7}[count]
    for result in results:
        assert result.get("same", True) and result.get("error", 0) < 1e-5, result
