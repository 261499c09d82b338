"""Several processes on a CPU, over gloo: every layout gives what one process gives, and a fault ends all of them."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
import weight_files
from places import PROGRAMS, ROOT
from starting import STANDALONE, finish, fork, start

import generate
from wan.models.wan import random_checkpoint

# Of the checkpoints that so many processes run.
HEADS = {2: (2, 3, 7), 4: (2, 3)}
SMALL = "--size 64*48 --frame_num 5 --sample_steps 2 --base_seed 1 --device cpu".split()
SMALL += ["--sparse_algo", "nabla-0.5_pool-1-4-4_dropped-mean"]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def results_of(nano, tmp_path_factory):
    """What the program `layouts.py` prints on a device, of random checkpoints by their numbers of heads."""

    def checkpoint(heads: int) -> Path:
        folder = tmp_path_factory.mktemp("heads") / "checkpoint"
        sizes = replace(random_checkpoint.MODELS["nano"], heads=heads, dim=64 * heads)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(random_checkpoint.MODELS, "other", sizes)
            random_checkpoint.write("other", folder, torch.float32)
        return folder

    @functools.cache
    def run(processes: int, device: str, *heads: int) -> list[dict]:
        checkpoints = [nano if number == 2 else checkpoint(number) for number in heads]
        # What has been asked of a GPU does not survive a fork.
        begin = fork if device == "cpu" else start
        program = begin(
            processes, PROGRAMS / "layouts.py", device, *checkpoints, cwd=tmp_path_factory.mktemp("layouts")
        )
        code, out, said = finish(program, seconds=400)
        assert code == 0, said
        return [json.loads(line) for line in out.splitlines()]

    return run


@pytest.mark.parametrize("count, heads", ((2, 2), (2, 3), (2, 7), (4, 2), (4, 3)))
def test_every_layout_gives_the_latents_of_one_process(count, heads, results_of):
    results = [result for result in results_of(count, "cpu", *HEADS[count]) if result.get("heads") == heads]
    assert len(results) >= 4
    for result in results:
        assert result["error"] < 1e-5, result
        # The first process holds the tables of a single row whole.
        assert result["held"] < 0.7 if result["sharded"] else result["held"] == 1, result


def test_compiled_blocks_give_the_latents_of_one_process_and_send_early_and_wait_late(results_of):
    (result,) = (result for result in results_of(2, "cpu", *HEADS[2]) if result.get("what") == "compiled")
    assert result["error"] < 1e-5
    # One graph for all blocks, in which all of q, k and v are sent before the first is waited for.
    assert result["orders"] == ["sss" + "www" + "a" + "s" + "w" + "a"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("heads", (3, 8))
def test_two_gpus_give_the_latents_of_one(heads, results_of):
    results = [result for result in results_of(2, "cuda", heads) if "heads" in result]
    assert len(results) == 4 and max(result["error"] for result in results) < 1e-3, results


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_pipeline_of_diffusers_split_over_two_gpus(results_of):
    (result,) = (one for one in results_of(2, "cuda", 8) if one.get("what") == "pipeline of diffusers")
    assert result["error"] < 1e-3


def test_step_caches_decide_alike_and_give_the_latents_of_one_process(results_of):
    results = [result for result in results_of(2, "cpu", *HEADS[2]) if result.get("what") == "cached"]
    assert len(results) == 14
    for result in results:
        # Where branches run apart, each process counts the forwards of its own.
        assert [result["cfg"] * result[name] for name in ("reused", "forwards")] == result["alone"], result
        assert result["error"] < 5e-5 and result["reused"] > 0, result


def test_under_diffusers_own_context_parallelism(results_of):
    errors = [result["error"] for result in results_of(2, "cpu", *HEADS[2]) if result.get("what") == "diffusers"]
    assert len(errors) == 2 and max(errors) < 1e-5


def test_the_pipeline_of_diffusers_split_offloaded_and_with_a_lora(results_of):
    (result,) = (one for one in results_of(2, "cpu", *HEADS[2]) if one.get("what") == "pipeline of diffusers")
    assert result["error"] < 1e-4


def test_the_same_video_from_one_process_and_from_several(random_nano, tmp_path):
    factors = weight_files.draw_factors(
        random_checkpoint.random_transformer("nano", torch.float32, torch.device("cpu"))
    )
    lora = weight_files.write_lora(tmp_path / "style.safetensors", factors)
    flags = ["--prompt", "A red circle", "--ckpt_dir", str(random_nano), "--lora", str(lora), *SMALL, "--save_file"]
    assert generate.main([*flags, str(tmp_path / "one.mp4")]) == 0
    for begin, name, count, extra in ((start, "two", 2, ("--dit_fsdp", "--t5_fsdp")), (fork, "four", 4, ())):
        code, _, said = finish(begin(count, ROOT / "generate.py", *flags, f"{name}.mp4", *extra, cwd=tmp_path))
        assert code == 0, said
        assert (iio.imread(tmp_path / f"{name}.mp4") == iio.imread(tmp_path / "one.mp4")).all()
        assert said.count("wrote ") == 1
    assert "layout: 4 processes: 2 guidance branches x 2 ways of the sequence" in said
    assert json.loads((tmp_path / "four.json").read_text())["made_with"]["layout"]["ulysses"] == 2


def test_two_machines(random_nano, tmp_path):
    command = [ROOT / "generate.py", "--prompt", "A cat", "--ckpt_dir", random_nano, *SMALL, "--save_file", "out.mp4"]
    common = "--nnodes=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:29713", "--rdzv_id=test"
    nodes = [fork(1, *command, cwd=tmp_path, how=common) for _ in range(2)]
    results = [finish(node) for node in nodes]
    assert [code for code, *_ in results] == [0, 0], results
    assert files(tmp_path) == ["out.json", "out.mp4"]


def test_prompts_go_to_replicas_and_a_second_run_makes_what_is_missing(random_nano, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = ["A red circle", "", json.dumps({"prompt": "A blue boat", "seed": 7, "size": "32*48", "name": "boat"})]
    lines += [json.dumps({"prompt": "One picture", "frame_num": 1}), "A cat"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    flags = ["--prompt_file", "prompts.txt", "--save_dir", "made", "--ckpt_dir", str(random_nano), *SMALL]
    code, _, said = finish(fork(2, ROOT / "generate.py", *flags, cwd=tmp_path))
    assert code == 0, said
    assert "layout: 2 processes: 2 replicas" in said
    made = tmp_path / "made"
    names = [name for name in files(made) if not name.endswith(".json")]
    plain = [re.sub("-[0-9a-f]{8}", "", name) for name in names]
    assert plain == ["A-cat.mp4", "A-red-circle.mp4", "One-picture.png", "boat.mp4"]
    assert iio.imread(made / "boat.mp4").shape[1:3] == (48, 32)
    (made / "boat.mp4").unlink()
    (made / names[0]).write_bytes(b"half a video")
    times = {name: (made / name).stat().st_mtime_ns for name in names[1:3]}
    # Of a single process, torchrun says no more.
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert generate.main(flags) == 0 and "prompts: 4, of which 2 are made already" in capsys.readouterr().err
    assert [name for name in files(made) if not name.endswith(".json")] == names
    assert times == {name: (made / name).stat().st_mtime_ns for name in names[1:3]}


@pytest.mark.parametrize(
    "fault, rank, message",
    (
        ("killed_in_sampling", "1", "error: process 0 lost another, which was killed or cut off"),
        ("unreadable_shard", "1", "cannot be read (Input/output error); check the path and the disk"),
        ("full_disk", "0", "error: out.mp4 cannot be written (No space left on device); free some space"),
        ("broken_code", "1", "ZeroDivisionError: a bug"),
    ),
)
def test_a_fault_of_one_process_ends_all_with_its_message(fault, rank, message, random_nano, tmp_path):
    command = [PROGRAMS / "faulty.py", fault, rank, "--prompt", "A cat", "--ckpt_dir", random_nano, *SMALL]
    # Who ends the others is torchrun, where one could not say a word, so it looks seldom enough for the others to.
    how = (*STANDALONE, "--monitor-interval=2") if fault == "killed_in_sampling" else STANDALONE
    code, _, said = finish(fork(2, *command, "--save_file", "out.mp4", cwd=tmp_path, how=how), seconds=60)
    assert code != 0 and message in said and files(tmp_path) == []
    assert said.count("error: ") <= 1 and said.count("Traceback (most recent call last):\n  File") <= 2


def test_an_interrupt_ends_all_within_seconds(random_nano, tmp_path):
    command = [PROGRAMS / "faulty.py", "slow_sampling", "1", "--prompt", "A cat", "--ckpt_dir", random_nano, *SMALL]
    process = start(2, *command, "--save_file", "out.mp4", cwd=tmp_path)
    said = ""
    while "sampling begins" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    code, _, said = finish(process, seconds=30)
    assert code != 0 and time.monotonic() - began < 15
    assert said.count("interrupted; no half-written file is left") == 1 and files(tmp_path) == []


def test_wrong_layouts_are_one_line_before_loading(random_nano, tmp_path):
    flags = [ROOT / "generate.py", "--prompt", "A cat", "--ckpt_dir", random_nano, *SMALL, "--save_file", "out.mp4"]
    code, _, said = finish(fork(2, *flags, "--ulysses_size", "3", cwd=tmp_path), seconds=60)
    assert code == 1 and said.count("error: ulysses_size 3 is more than the 2 heads of the model; lower it") == 1
    # torchrun's own are behind the time and place of a line of its log.
    assert not re.search(r"^Traceback", said.split("torch/distributed")[0], re.MULTILINE) and files(tmp_path) == []
