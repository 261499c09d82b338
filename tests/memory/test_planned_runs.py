"""A pipeline and a run by a plan of memory give what the plain ones give."""

from __future__ import annotations

import json
from dataclasses import replace

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
import wan_family_sets
import weight_files

import generate
import wan
from wan.memory import planning
from wan.memory.estimates import GIB
from wan.memory.planner import MemoryBudget, MemoryPlan
from wan.models.checkpoint import Checkpoint
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


GREY = np.full((64, 64, 3), 127, np.uint8)
# What each is given for five frames of 64x64.
GIVEN = {
    "i2v": {"image": GREY},
    "flf2v": {"image": GREY, "last_image": GREY},
    "vace": {"src_ref_images": [GREY]},
    "wan22_t2v": {},
    "wan22_i2v": {"image": GREY},
    "ti2v_5b": {"image": GREY},
}


@pytest.mark.parametrize("kept", (0, 2, 3))
@pytest.mark.parametrize("task", wan_family_sets.TASKS)
def test_planned_models_of_each_kind_give_what_plain_ones_give(task, kept):
    """Streamed or kept, experts one after the other, in three steps that both of them have a part of."""
    given, text = GIVEN[task], wan_family_sets.expected(task)
    size, frames, has_two = (64, 64), 5, task in wan_family_sets.TWO_EXPERTS

    def latents(plan: MemoryPlan | None) -> torch.Tensor:
        pipe = wan.from_pretrained(wan_family_sets.checkpoint(task), "dense", plan=plan)
        conditions = pipe.condition(**given, size=size, frame_num=frames) if given else None
        count, *grid = pipe.video.geometry.latents_size(size, frames)
        shape = pipe.transformer.config.out_channels, count + (task == "vace"), *grid
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        states = text["dit.context"][None], text["dit.negative"][None]
        assert len(pipe.transformers) == 1 + has_two and pipe.offload is (plan is not None)
        return pipe.sample(*states, noise=noise, steps=3, conditions=conditions)

    planned = replace(PLAN, kept=kept, blocks=3, text="gpu", experts=1 + has_two)
    assert torch.equal(latents(planned), latents(None))


@pytest.mark.parametrize("task", wan_family_sets.TASKS)
def test_what_is_weighed_of_a_checkpoint_is_what_it_has(task):
    checkpoint = Checkpoint.open(wan_family_sets.checkpoint(task))
    settings = checkpoint.resolve({"prompt": "a cat"} | {name: "a.png" for name in GIVEN[task] if name == "image"})
    weighed = checkpoint.family.load_memory()(checkpoint, [settings])
    pipe = wan.from_pretrained(checkpoint)
    own = sum(tensor.numel() * 4 for tensor in pipe.transformer.parameters())
    assert weighed.transformer.bytes(None) == own and weighed.experts == len(pipe.transformers)
    assert (weighed.picture > 0) is (pipe.image_encoder is not None)
    (workload,) = weighed.workloads
    frames = None if workload.encoding is None else workload.encoding.frames
    assert frames == {"wan22_t2v": None, "ti2v_5b": 1}.get(task, settings.video.frame_num)
