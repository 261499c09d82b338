"""Programs of scripts/: interrupted while they import as well as later, and what cannot be written is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from scripts import draw_benchmarks, draw_shapes
from wan.observe.console import run_program


def test_what_takes_seconds_to_import_is_imported_where_ctrl_c_is_minded():
    scripts = sorted((ROOT / "scripts").glob("*.py"))
    program = f"import runpy, sys\nfor file in {[str(file) for file in scripts]}: runpy.run_path(file)\n"
    program += "print(sys.modules.keys() & {'torch', 'diffusers', 'transformers', 'numpy'})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert len(scripts) > 10 and done.stdout == "set()\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    "program, arguments, said",
    (
        (draw_benchmarks, ["no\x1b[31mfile", "--out", "x.png"], r"no\x1b[31mfile"),
        (draw_benchmarks, ["empty", "--out", "x.png"], "do not all end in a line of JSON"),
        (draw_benchmarks, ["rows", "--out", "none/x.png"], "none/x.png cannot be written"),
        (draw_shapes, ["--out", "none/\x1b[31mx.png", "--count", "1"], r"\x1b[31mx.png"),
        (draw_shapes, ["--out", "x.png", "--columns", "0"], "columns 0 must be 1 or more"),
        (draw_shapes, ["--out", "x.png", "--count", "0"], "count 0 must be 1 or more"),
    ),
)
def test_what_cannot_be_read_or_written_is_one_line(program, arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").write_text('{"rows": []}')
    Path("rows").write_text('{"rows": [{"what": "64x48x5: dense", "ms": 1.0}]}')
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    assert run_program(program.main) == 2
    errors = capsys.readouterr().err
    assert said in errors and errors.count("\n") == 1 and "\x1b" not in errors and not Path("x.png").exists()
