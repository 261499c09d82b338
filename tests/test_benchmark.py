"""The benchmark runs on a CPU at small sizes and prints a table and one line of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import wan
from wan.random_checkpoint import random_transformer

SCRIPT = Path(wan.__file__).parents[1] / "scripts" / "benchmark.py"


@pytest.mark.parametrize(
    "mode, first", (("mask", "masks, keep-0.1"), ("attention", "dense, sdpa"), ("forward", "dense, sdpa"))
)
def test_modes(mode, first):
    command = [sys.executable, str(SCRIPT), mode, "--quick", "--size", "64*48", "--frame_num", "5", "--device", "cpu"]
    run = subprocess.run([*command, "--model", "nano", "--dtype", "float32"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *table, record = run.stdout.splitlines()
    record = json.loads(record)
    assert record["mode"] == mode and record["machine"]["torch"] == torch.__version__
    assert len(record["rows"]) == len(table) and record["rows"][0]["what"] == first
    assert all(row["low"] <= row["ms"] <= row["high"] for row in record["rows"])


def test_bad_sizes_are_one_line():
    run = subprocess.run([sys.executable, str(SCRIPT), "mask", "--size", "3*3"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: size 3*3") and run.stderr.count("\n") == 1


def test_random_transformer_is_the_checkpoint_s_model(random_nano):
    made = random_transformer("nano", torch.bfloat16, torch.device("cpu"))
    loaded = wan.WanT2V.from_pretrained(random_nano, dtype=torch.bfloat16).transformer
    kinds = [{name: (t.shape, t.dtype) for name, t in model.state_dict().items()} for model in (made, loaded)]
    assert kinds[0] == kinds[1]
