"""Programs as processes of their own, under torchrun or alone: started anew, or forked from a process that has
imported what they need, which spares most of the time that small ones take.

As a script: under torchrun, run the program that its arguments name.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STANDALONE = ("--standalone",)
IMPORTS = ["torch.distributed.run", "wan.run.generation", "wan.training.trainer", "wan.shapes.train_vae"]


class Forked:
    """As `Popen`, for what `finish` takes: a forked program in a process group of its own."""

    def __init__(self, script: Path | str, *arguments: object, cwd: Path, env: dict[str, str] | None = None):
        self._folder = tempfile.TemporaryDirectory()
        # Files, since pipes that nobody reads yet would fill.
        self._outputs = [os.path.join(self._folder.name, name) for name in ("out", "err")]
        argv = [str(part) for part in (script, *arguments)]
        given = argv, str(cwd), dict(os.environ) | (env or {}), self._outputs
        self._process = _server().Process(target=_run, args=given)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    returncode = property(poll)

    def has_begun(self) -> bool:
        """Whether it has come to the program itself."""
        return os.path.exists(self._outputs[-1])

    def communicate(self, timeout: float) -> tuple[str, str]:
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return tuple(Path(name).read_text() for name in self._outputs)


def start(count: int, *command: object, cwd: Path, how: tuple[str, ...] = STANDALONE) -> subprocess.Popen:
    """A program under torchrun, in a process group of its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", *how, f"--nproc_per_node={count}"]
    env = os.environ | {"PYTHONPATH": _path()}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen([*torchrun, *map(str, command)], cwd=cwd, env=env, **pipes)


def fork(count: int, *command: object, cwd: Path, how: tuple[str, ...] = STANDALONE) -> Forked:
    """The same, by a torchrun that is forked and forks the program's processes."""
    import torch.distributed.run

    flags = *how, f"--nproc_per_node={count}", "--run-path", "--start-method=fork"
    return Forked(torch.distributed.run.__file__, *flags, __file__, *command, cwd=cwd)


def finish(process: subprocess.Popen | Forked, seconds: float = 180) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    try:
        out, said = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, said


def _path() -> str:
    """The project before the caller's own packages."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


@functools.cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("PYTHONPATH", _path())
        forkserver.ensure_running()
    return context


def _run(argv: list[str], cwd: str, env: dict[str, str], outputs: list[str]) -> None:
    os.setsid()
    for number, name in enumerate(outputs, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    # What the program starts itself, it starts as it would if nobody had forked it.
    multiprocessing.set_start_method(None, force=True)
    _run_script(argv)


def _run_script(argv: list[str]) -> None:
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).parent))
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    try:
        _run_script(sys.argv[1:])
    except SystemExit as ended:
        # torchrun would wait for what the function returns.
        if ended.code:
            raise
