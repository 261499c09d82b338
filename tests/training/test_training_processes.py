"""Training by several processes, and by one that is killed, as programs: the same as one process in peace."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from family_runs import family_settings, prepare_clips
from places import PROGRAMS, ROOT
from safetensors.torch import load_file
from shapes_runs import vae_settings_dict
from starting import Forked, finish, fork
from training_runs import exact_rows, settings_dict, train
from wan_family_sets import with_tokenizer

from wan.training.metrics import METRICS_FILE, read_metrics

SCRIPT = ROOT / "scripts" / "train.py"
PROGRAM = PROGRAMS / "train_runs.py"


def write_config(content: dict, path: Path) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def alone(random_nano, prepared, tmp_path_factory) -> tuple[dict, list[dict]]:
    """A run by one process, its settings and metrics."""
    content = settings_dict(random_nano, prepared, tmp_path_factory.mktemp("alone") / "run", micro_batch=1)
    return content, train(content)


@pytest.fixture(scope="module")
def alone_with_muon(alone, tmp_path_factory) -> tuple[dict, list[dict]]:
    content = alone[0] | {"out": str(tmp_path_factory.mktemp("alone") / "muon"), "matrix_lr": 0.01}
    return content, train(content)


@pytest.fixture(scope="module")
def alone_of_two(tmp_path_factory) -> tuple[dict, list[dict]]:
    """A LoRA of one of two experts."""
    folder = tmp_path_factory.mktemp("experts")
    base = with_tokenizer("wan22_t2v", folder / "base")
    changes = {"expert": "high", "lora": {"rank": 2}, "steps": 6, "batch_size": 4, "micro_batch": 1, "ema": 0.9}
    content = family_settings(base, prepare_clips(base, folder / "clips"), folder / "run", **changes)
    return content, train(content)


@pytest.fixture(scope="module")
def together(alone, alone_of_two, tmp_path_factory) -> Path:
    """The same by two processes, which repeat the weights (DDP) or shard them (FSDP), each run in two pieces."""
    folder = tmp_path_factory.mktemp("together")
    configs = []
    for name, base, changes in (
        ("ddp", alone[0], {}),
        ("fsdp", alone[0], {"shard": True}),
        ("muon", alone[0], {"matrix_lr": 0.01}),
        ("expert", alone_of_two[0], {}),
    ):
        for steps in (4, 6):
            content = base | {"out": str(folder / name), "steps": steps} | changes
            configs.append(write_config(content, folder / f"{name}-{steps}.yaml"))
    code, _, said = finish(fork(2, PROGRAM, *configs, cwd=folder))
    assert code == 0, said
    return folder


@pytest.mark.parametrize(
    "name, single", (("ddp", "alone"), ("fsdp", "alone"), ("muon", "alone_with_muon"), ("expert", "alone_of_two"))
)
def test_two_processes_train_as_one(together, name, single, request):
    content, rows = request.getfixturevalue(single)
    ours = {row["step"]: row for row in exact_rows(together / name)}
    for row in rows:
        for key in row.keys() - {"kept"}:
            assert ours[row["step"]][key] == pytest.approx(row[key], rel=1e-4), (row["step"], key)
    for which in ("model", "ema"):
        file = Path("latest") / which / "transformer" / "diffusion_pytorch_model.safetensors"
        one, two = (load_file(Path(run) / file) for run in (content["out"], together / name))
        assert one.keys() == two.keys()
        assert all(torch.allclose(one[key], two[key], atol=2e-4) for key in one)


def test_a_run_killed_outright_goes_on_exactly(alone, tmp_path):
    content, rows = alone
    content = content | {"out": str(tmp_path / "run")}
    process = Forked(SCRIPT, "--config", write_config(content, tmp_path / "config.yaml"), cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "latest").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    code, _, said = finish(process)
    assert code == -signal.SIGKILL, said
    assert len(exact_rows(tmp_path / "run")) < len(rows)
    assert train(content) == rows


def has_begun(run: Path) -> bool:
    return (run / METRICS_FILE).is_file() and bool(exact_rows(run))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_run_whose_launcher_is_told_to_end_leaves_a_checkpoint_and_ends(alone, tmp_path):
    run = tmp_path / "run"
    content = alone[0] | {"out": str(run), "steps": 10_000, "every": {"checkpoint": 10_000}}
    config = write_config(content, tmp_path / "config.yaml")
    options = ("--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options, SCRIPT, "--config", config]
    process = subprocess.Popen(launch, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not has_begun(run) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.terminate()
        # Until the run, which writes there too, has ended.
        _, said = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGTERM and "start again in the same way to go on" in said, said
    assert (run / "latest" / "model" / "transformer").is_dir()


def test_two_processes_train_a_vae(tmp_path):
    content = vae_settings_dict(
        tmp_path / "run", cuts=[{"batch": 2, "size": "16*16", "frames": 5, "clips": 4}], steps=3
    )
    path = write_config(content, tmp_path / "config.yaml")
    code, _, said = finish(fork(2, ROOT / "scripts" / "train_vae.py", "--config", path, cwd=tmp_path))
    assert code == 0, said
    rows = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert [row["step"] for row in rows] == [1, 2, 3, 3] and rows[-1]["psnr_32*32"] > 0
    assert (tmp_path / "run" / "vae" / "config.json").is_file()
