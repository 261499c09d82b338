"""Kandinsky-5 by a plan of memory gives what it gives without one."""

from __future__ import annotations

import json
from dataclasses import replace

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

import generate
import wan
from wan.memory import planning
from wan.memory.estimates import GIB
from wan.memory.load_plan import ComponentBytes, make_load_plan
from wan.memory.options import LoadOptions
from wan.memory.planner import MemoryBudget, MemoryPlan
from wan.models.kandinsky import latents, random_checkpoint
from wan.models.kandinsky.vae import split_picture
from wan.run import run

PLAN = MemoryPlan(None, None, True, 0, 3, "stream", 1, False, {"sampling": 0}, 0, 1.0)
SETTINGS = {"size": (64, 48), "frame_num": 5, "seed": 1, "steps": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kandinsky") / "nano"
    random_checkpoint.write("kandinsky5-nano", folder, torch.float32)
    return folder


@pytest.fixture(scope="module")
def exact(checkpoint):
    return wan.from_pretrained(checkpoint, "nabla-0.7").generate("a cat", **SETTINGS)


@pytest.mark.parametrize("text", ("gpu", "stream", "cpu"))
@pytest.mark.parametrize("kept", (0, 1, 3))
def test_a_planned_pipeline_gives_what_the_plain_one_gives(checkpoint, exact, text, kept):
    pipe = wan.from_pretrained(checkpoint, "nabla-0.7", plan=replace(PLAN, text=text, kept=kept))
    assert hasattr(pipe.transformer, "block_stream") and pipe.offload
    assert hasattr(pipe.text_encoder, "block_stream") is (text == "stream")
    for _ in range(2):
        assert (pipe.generate("a cat", **SETTINGS) == exact).all()


def test_models_that_stay_are_not_streamed(checkpoint, exact):
    pipe = wan.from_pretrained(checkpoint, "nabla-0.7", plan=replace(PLAN, in_turns=False, text="gpu"))
    assert not hasattr(pipe.transformer, "block_stream") and not pipe.offload
    assert (pipe.generate("a cat", **SETTINGS) == exact).all()


def test_a_picture_begins_a_planned_video(checkpoint):
    picture = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    plain, planned = (
        wan.from_pretrained(checkpoint, "nabla-0.7", plan=plan).generate("a cat", **SETTINGS, image=picture)
        for plan in (None, PLAN)
    )
    assert (planned == plain).all()


def test_tiles_of_a_planned_decode_follow_the_whole(checkpoint, monkeypatch):
    """Columns as a GPU with little memory left would have them."""
    pipe = wan.from_pretrained(checkpoint, plan=replace(PLAN, tiles=2))
    draw = torch.Generator().manual_seed(0)
    given, widths = torch.randn(1, 16, 7, 6, 24, generator=draw), []
    whole = pipe.decode(given)
    monkeypatch.setattr(latents, "set_tiles", lambda vae, _: split_picture(vae, (192, 48), 2))
    decoder = pipe.vae.decoder
    decoder.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[-1]))
    tiled = pipe.decode(given)
    assert tiled.shape == whole.shape == (1, 3, 25, 48, 192) and max(widths) == 20
    assert 0 < (tiled - whole).norm() / whole.norm() < 0.5


@pytest.mark.parametrize("text, in_turns", (("gpu", True), ("stream", True), ("gpu", False)))
@pytest.mark.parametrize("key", ("int8", "int4"))
def test_a_planned_pipeline_runs_quantised(checkpoint, caplog, text, in_turns, key):
    pytest.importorskip("torchao")
    plain = wan.from_pretrained(checkpoint, "nabla-0.7", dtype=torch.bfloat16).generate("a cat", **SETTINGS)
    caplog.set_level("INFO", "wan")
    plan = replace(PLAN, quantization=key, text_quantization="int8", text=text, in_turns=in_turns)
    pipe = wan.from_pretrained(checkpoint, "nabla-0.7", dtype=torch.bfloat16, plan=plan)
    for _ in range(2):
        assert abs(pipe.generate("a cat", **SETTINGS).astype(float) - plain).mean() < (40 if key == "int4" else 12)
    # Of three blocks, their modulations left; and of two layers of the language model.
    assert f"transformer: 30 linear layers in {key}" in caplog.text
    assert "text encoder: 14 linear layers in int8" in caplog.text


def test_a_run_is_planned_from_its_checkpoint_and_refused_with_what_would_do(
    checkpoint, exact, tmp_path, monkeypatch, capsys
):
    """The run of a GPU with little memory, on a CPU in its place."""
    gpu = 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "check_memory", lambda *_: None)
    monkeypatch.setattr(planning, "budget_of", lambda *_: MemoryBudget(gpu, 8 * GIB, 16 * GIB))
    monkeypatch.setattr(planning, "limit", lambda *_: None)
    flags = ["--prompt", "a cat", "--ckpt_dir", str(checkpoint), "--device", "cpu", "--save_file", "out.mp4"]
    flags += "--size 64*48 --frame_num 5 --sample_steps 2 --base_seed 1 --sparse_algo nabla-0.7".split()
    assert generate.main([*flags, "--memory", "24"]) == 2
    said = capsys.readouterr().err
    assert "error: memory: 5 frames of 64*48 do not fit into 0.0 GB of the GPU with 8.0 GiB" in said
    gpu = int(float(said.split("free; ")[1].split(" GB")[0]) * 1e9)
    assert generate.main([*flags, "--memory", "24"]) == 0
    assert "memory: transformer float32, " in capsys.readouterr().err
    planned = imageio.imread("out.mp4")
    made_with = json.loads((tmp_path / "out.json").read_text())["made_with"]
    assert made_with["memory"] == 24 and made_with["plan"]["packing"] is None and made_with["plan"]["stages"]
    assert generate.main(flags) == 0 and (imageio.imread("out.mp4") == planned).all()


def test_what_is_asked_for_without_a_plan_is_where_it_says(checkpoint):
    pipe = wan.from_pretrained(checkpoint, "nabla-0.7", t5_cpu=True, offload=True)
    assert pipe.text_device.type == "cpu" and pipe.offload and not hasattr(pipe.transformer, "block_stream")
    # CLIP goes with the language model, whatever that is asked to do.
    sizes = ComponentBytes(4 * GIB, 14 * GIB, GIB)
    plan = make_load_plan(LoadOptions(torch.device("cuda"), offload=True, t5_cpu=True), True, sizes)
    assert plan.text_encoder.waits == plan.text_encoder.runs == torch.device("cpu")
    assert plan.transformer.quantization == "fp8" and plan.transformer.runs.type == "cuda"
