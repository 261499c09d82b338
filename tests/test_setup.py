"""scripts/setup.sh: whole or not there, however it is cut, and one at a time. scripts/test.sh: no fault is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from places import ROOT

FILES = {
    "torch.py": "def main(): print('from torch')\n",
    "torch-2.13.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n",
    "torch-2.13.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "torch-2.13.0.dist-info/entry_points.txt": "[console_scripts]\nsay-torch = torch:main\n",
}


@pytest.fixture
def project(tmp_path) -> Path:
    """A project of setup.sh alone, whose torch is a file of a line."""
    with zipfile.ZipFile(tmp_path / "torch-2.13.0-py3-none-any.whl", "w") as wheel:
        for name, text in FILES.items():
            wheel.writestr(name, text)
        wheel.writestr("torch-2.13.0.dist-info/RECORD", "".join(f"{name},,\n" for name in FILES))
    folder = tmp_path / "a project"
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "setup.sh", folder / "scripts")
    (folder / "requirements.txt").write_text("torch==2.13.0\n")
    # As a home folder or a temporary one may be reached.
    (tmp_path / "a link").symlink_to(folder)
    return tmp_path / "a link"


def begin(project: Path, **further: str) -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    # Bash believes it, links and all.
    env |= {"PWD": str(project)}
    env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(project.parent), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    env |= {"PYTHON": sys._base_executable} | further
    command = ["bash", "scripts/setup.sh"]
    return subprocess.Popen(
        command,
        cwd=project,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_set_up_that_is_cut_is_mended_by_the_next_of_which_two_at_once_wait_for_each_other(project):
    cut = begin(project)
    while not (project / ".venv.partial" / "bin").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    os.killpg(cut.pid, signal.SIGKILL)
    cut.communicate()
    assert not (project / ".venv").exists()
    # As an earlier set-up may have left it: a Python without a pip.
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "bin" / "python").symlink_to(sys._base_executable)
    both = [begin(project) for _ in range(2)]
    said = [run.communicate(timeout=120)[0] for run in both]
    assert [run.returncode for run in both] == [0, 0], said
    assert sum("another set-up runs in" in text for text in said) == 1
    installed = subprocess.run([str(project / ".venv" / "bin" / "say-torch")], capture_output=True, text=True)
    assert installed.stdout == "from torch\n" and not (project / ".venv.partial").exists()


def test_an_environment_is_built_anew_when_its_python_is_gone_and_left_alone_when_it_works(project):
    venv = project / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to("/gone/python3")
    shutil.copy(project / "requirements.txt", venv / "installed-requirements.txt")
    said = begin(project).communicate(timeout=120)[0]
    installed = subprocess.run([str(venv / "bin" / "say-torch")], capture_output=True, text=True)
    assert installed.stdout == "from torch\n", said
    # No lock is taken where nothing is to be done: the folder may be one that cannot be written.
    (project / ".venv.lock").unlink()
    again = begin(project)
    assert again.communicate(timeout=120)[0] == "" and again.returncode == 0 and not (project / ".venv.lock").exists()


def test_a_folder_that_cannot_be_locked_is_set_up_and_this_is_said(project, tmp_path):
    stand_in = "import fcntl, os\ndef flock(*_): raise OSError(38, os.strerror(38))\nfcntl.flock = flock\n"
    (tmp_path / "lockless").mkdir()
    (tmp_path / "lockless" / "sitecustomize.py").write_text(stand_in)
    run = begin(project, PYTHONPATH=str(tmp_path / "lockless"))
    said = run.communicate(timeout=120)[0]
    assert run.returncode == 0 and "this folder cannot be locked (Function not implemented)" in said


@pytest.mark.parametrize("fault", ["", "ruff check", "ruff format --check", "mypy", "pytest"])
def test_tests_fail_by_style_by_types_and_by_tests_and_say_of_which(tmp_path, fault):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "test.sh", tmp_path / "scripts")
    (tmp_path / "scripts" / "setup.sh").write_text("")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\necho "did $*"\n[[ -z "$FAULT" || "$*" != *"-m $FAULT"* ]] || exit 3\n')
    python.chmod(0o755)
    command = ["bash", "scripts/test.sh", "tests/nabla", "-x"]
    run = subprocess.run(command, cwd=tmp_path, env=os.environ | {"FAULT": fault}, capture_output=True, text=True)
    assert run.returncode == (3 if fault else 0) and f"did -m {fault}" in run.stdout
    assert fault.startswith("ruff") or ("did -m mypy" in run.stdout and "tests/nabla -x\n" in run.stdout)
