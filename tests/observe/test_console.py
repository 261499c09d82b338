"""How programs speak and end: no message ends a run, no signal leaves half a file, nothing from outside is obeyed."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import ROOT

from nabla import InputError
from wan.observe.console import positive, printable

PROGRAM = """
import logging, sys, time
from wan.observe.console import exit_with, log_to_stderr, run_program

def main():
    try:
        open("begun", "w").close()
        for number in range(200 if "waits" in sys.argv else 3):
            logging.getLogger("wan").info("line %d\\x1b[31m\\nof two", number)
            print("said by a library", file=sys.stderr, flush=True)
            print("a result", flush=True)
            time.sleep(0.05 if "waits" in sys.argv else 0)
        open("done", "w").close()
    finally:
        open("cleaned", "w").close()

log_to_stderr()
exit_with(run_program(main))
"""


def begin(folder: Path, *arguments: str, shell: str = "", **how) -> subprocess.Popen:
    (folder / "program.py").write_text(PROGRAM)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "program.py", *arguments]
    if shell:
        command = ["bash", "-c", f"{sys.executable} program.py {shell}"]
    return subprocess.Popen(command, cwd=folder, env=env, **how)


@pytest.mark.parametrize("shell", ("2>&-", ">&- 2>&-", "2>/dev/full", "2>&1 | true", "> >(true) 2> >(true)"))
def test_a_run_outlives_whoever_reads_its_messages(shell, tmp_path):
    run = begin(tmp_path, shell=f"{shell}; exit ${{PIPESTATUS[0]}}")
    assert run.wait(60) == 0 and (tmp_path / "done").exists()
    # Closed, the numbers of the streams go to files that are opened next.
    assert (tmp_path / "done").stat().st_size == (tmp_path / "begun").stat().st_size == 0


def test_a_result_that_a_full_disk_lost_is_an_error_at_the_end(tmp_path):
    run = begin(tmp_path, shell=">/dev/full", stderr=subprocess.PIPE, text=True)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 1 and (tmp_path / "done").exists()
    assert said.splitlines()[-1].startswith("error: what was printed could not be written (No space left on device)")


def test_letters_that_a_stream_lacks_are_spelled(tmp_path):
    code = "from wan.observe.console import run_program\nrun_program(lambda: print('ein rotes \u7ea2 K\u00e4stchen'))\n"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert said.stdout == "ein rotes \\u7ea2 K\\xe4stchen\n" and said.returncode == 0


def test_lines_of_a_log_are_single_and_obeyed_by_no_terminal(tmp_path):
    run = begin(tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    said = run.communicate(timeout=60)[1]
    assert said.splitlines()[0] == r"line 0\x1b[31m\nof two"


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
def test_signals_end_a_program_after_it_cleaned_up(number, tmp_path):
    run = begin(tmp_path, "waits", stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    run.send_signal(number)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 128 + number and (tmp_path / "cleaned").exists() and not (tmp_path / "done").exists()
    assert "Traceback" not in said and said.splitlines()[-1].endswith("no half-written file is left")


def test_a_program_under_nohup_outlives_its_terminal(tmp_path):
    ignoring = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    run = begin(tmp_path, "waits", stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **ignoring)
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    run.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert run.poll() is None
    run.kill()
    run.wait()


@pytest.mark.parametrize("program", ("generate.py", "app.py"))
def test_ctrl_c_while_torch_is_imported_is_one_line(program, tmp_path):
    command = [sys.executable, str(ROOT / program), *(["--prompt", "a cat"] if program == "generate.py" else [])]
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{run.pid}/maps")
    while run.poll() is None and "libtorch" not in maps.read_text():
        time.sleep(0.005)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and "Traceback" not in said and said.startswith("interrupted")


def test_errors_show_what_is_from_outside_in_one_short_line():
    error = InputError("name \x1b]0;mine\x07 \r\n \u202e \ud800 " + "x" * 10**6)
    assert str(error).isprintable() and len(str(error)) < 2100
    assert printable("Ein roter Kreis, 红色 🔴\t") == "Ein roter Kreis, 红色 🔴\\t"


def test_a_flag_that_counts_something_takes_no_zero():
    assert positive("12") == 12
    for text in ("0", "-1", "1.0", "", "x", "²", "9" * 5000):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a positive whole number"):
            positive(text)
