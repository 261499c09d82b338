"""A pipeline and a run by a plan of memory give what the plain ones give."""

from __future__ import annotations

import json
from dataclasses import replace

import imageio.v3 as imageio
import pytest
import torch
import weight_files

import generate
import wan
from wan.memory import planning
from wan.memory.estimates import GIB
from wan.memory.planner import MemoryBudget, MemoryPlan
from wan.models.wan.random_checkpoint import random_transformer
from wan.run import run

CPU = torch.device("cpu")
PLAN = MemoryPlan(None, None, True, 0, 2, "stream", 1, False, {"sampling": 0}, 0, 1.0)


@pytest.mark.parametrize("text", ("gpu", "stream", "cpu"))
def test_a_planned_pipeline_gives_what_the_plain_one_gives(random_nano, tmp_path, text):
    factors = weight_files.draw_factors(random_transformer("nano", torch.float32, CPU))
    lora = [str(weight_files.write_lora(tmp_path / "style.safetensors", factors))]
    settings = dict(size=(64, 48), frame_num=5, seed=1, steps=2)
    exact = wan.WanT2V.from_pretrained(random_nano, "nabla-0.7", lora=lora).generate("a cat", **settings)
    for plan in (replace(PLAN, text=text), replace(PLAN, in_turns=False, text="gpu")):
        pipe = wan.WanT2V.from_pretrained(random_nano, "nabla-0.7", lora=lora, plan=plan)
        assert hasattr(pipe.transformer, "block_stream") is plan.in_turns is pipe.offload
        assert hasattr(pipe.text_encoder, "block_stream") is (plan.text == "stream")
        for _ in range(2):
            assert (pipe.generate("a cat", **settings) == exact).all()


def test_a_planned_pipeline_runs_packed(random_nano, caplog):
    pytest.importorskip("torchao")
    settings = dict(size=(64, 48), frame_num=5, seed=1, steps=2)
    exact = wan.WanT2V.from_pretrained(random_nano, "nabla-0.7", dtype=torch.bfloat16).generate("a cat", **settings)
    caplog.set_level("INFO", "wan")
    plan = replace(PLAN, quantization="int8", text_quantization="int8", text="gpu")
    pipe = wan.WanT2V.from_pretrained(random_nano, "nabla-0.7", dtype=torch.bfloat16, plan=plan)
    assert abs(pipe.generate("a cat", **settings).astype(float) - exact).mean() < 12
    assert "transformer: 20 linear layers in int8" in caplog.text and "text encoder: 14 linear layers" in caplog.text


def test_a_run_is_planned_from_its_checkpoint_and_refused_with_what_would_do(
    random_nano, tmp_path, monkeypatch, capsys
):
    """The run of a GPU with little memory, on a CPU in its place."""
    gpu = 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "check_memory", lambda *_: None)
    monkeypatch.setattr(planning, "budget_of", lambda *_: MemoryBudget(gpu, 8 * GIB, 16 * GIB))
    monkeypatch.setattr(planning, "limit", lambda *_: None)
    flags = ["--prompt", "a cat", "--ckpt_dir", str(random_nano), "--device", "cpu", "--save_file", "out.mp4"]
    flags += "--size 64*48 --frame_num 5 --sample_steps 2 --base_seed 1".split()
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
