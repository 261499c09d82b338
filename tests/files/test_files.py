"""Files that are whole or not there: on the disk, with the umask's permissions, nothing left of programs that died."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from places import ROOT
from safetensors.torch import save_file

from nabla import InputError
from wan.files.atomic import atomic_path, scratch
from wan.files.json_files import write_json


@pytest.mark.parametrize("mask, file, folder", ((0o022, 0o644, 0o755), (0o027, 0o640, 0o750), (0o002, 0o664, 0o775)))
def test_files_have_the_permissions_of_the_umask(mask, file, folder, tmp_path):
    """safetensors writes files that only their owner can read."""
    before = os.umask(mask)
    try:
        with atomic_path(tmp_path / "model") as partial:
            partial.mkdir()
            save_file({"x": torch.zeros(2)}, partial / "x.safetensors")
        with atomic_path(tmp_path / "y.safetensors") as partial:
            save_file({"x": torch.zeros(2)}, partial)
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == folder
    for path in (tmp_path / "model" / "x.safetensors", tmp_path / "y.safetensors"):
        assert path.stat().st_mode & 0o777 == file


def test_what_fails_leaves_the_earlier_file(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    before = (tmp_path / "a.json").read_bytes()
    for error, raised in ((OSError(errno.ENOSPC, "No space left on device"), InputError), (KeyboardInterrupt(),) * 2):
        with pytest.raises(raised if isinstance(raised, type) else type(raised)):
            with atomic_path(tmp_path / "a.json") as partial:
                partial.write_bytes(b"half")
                raise error
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
        assert (tmp_path / "a.json").read_bytes() == before


def test_a_full_disk_is_said_with_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"a.bin cannot be written \(No space left on device\); free some space"):
        with atomic_path(tmp_path / "a.bin") as partial:
            partial.symlink_to("/dev/full")
            partial.write_bytes(b"x" * 100_000)


def test_what_a_killed_program_left_is_removed_and_what_others_write_is_not(tmp_path):
    code = "import os, sys\nfrom pathlib import Path\nfrom wan.files.atomic import scratch, atomic_path\n"
    code += "with scratch(Path('.')) as one, atomic_path(Path('x.mp4')) as two:\n"
    code += (
        "    (one / 'half').write_text('x'); two.write_text('x')\n    print(one, flush=True)\n    sys.stdin.read()\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    run = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env, **pipes)
    assert run.stdout.readline()
    another = tmp_path / ".partial-000000-1-x"  # as of another machine, on a disk that both have
    another.write_text("x")
    with scratch(tmp_path):
        assert len(list(tmp_path.glob(".partial-*"))) == 4
    run.kill()
    run.communicate()
    with atomic_path(tmp_path / "y.mp4") as partial:
        partial.write_text("y")
    assert sorted(path.name for path in tmp_path.iterdir()) == [another.name, "y.mp4"]
    with atomic_path(tmp_path / ("n" * 250 + ".mp4")) as partial:
        partial.write_text("a name as long as names can be")


def test_what_another_process_removes_at_the_same_time_is_no_error(tmp_path, monkeypatch):
    with scratch(tmp_path) as own:
        left = own.rename(tmp_path / re.sub(rf"-{os.getpid()}-", f"-{2**22 + 1}-", own.name))
        (left / "half").write_text("x")
    rmtree = shutil.rmtree

    def slower(path):
        rmtree(path)
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", slower)
    with atomic_path(tmp_path / "a.json") as partial:
        partial.write_text("a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
