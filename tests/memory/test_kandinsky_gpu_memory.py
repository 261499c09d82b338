"""Kandinsky-5 on a CUDA GPU by plans of memory: the video of the plain pipeline, and peaks that were expected."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import wan
from nabla import NablaConfig
from wan.config.settings import VideoSettings
from wan.memory.budget import limit
from wan.memory.estimates import decode_bytes
from wan.memory.planner import GB, MemoryBudget, MemoryPlan
from wan.models.kandinsky import random_checkpoint
from wan.models.kandinsky.latents import decode
from wan.models.kandinsky.vae import decoding_of, prepare_decoder

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
PLAN = MemoryPlan(None, None, True, 0, 3, "stream", 1, True, {"sampling": 0}, 0, 1.0)
SETTINGS = {"size": (256, 208), "frame_num": 9, "seed": 1, "steps": 2}


@pytest.fixture(autouse=True)
def no_limit_afterwards():
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kandinsky") / "nano"
    random_checkpoint.write("kandinsky5-nano", folder, torch.float32)
    return folder


@pytest.mark.parametrize("key", (None, "int8", "int4", "fp8"))
@pytest.mark.parametrize("in_turns", (False, True))
def test_a_planned_pipeline_follows_the_plain_one(checkpoint, key, in_turns):
    if key is not None:
        pytest.importorskip("torchao")
    if key == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs a GPU of compute capability 8.9")
    half = NablaConfig(threshold=0.5)
    plain = wan.from_pretrained(checkpoint, half, "cuda", torch.bfloat16).generate("a cat", **SETTINGS)
    for text, of_text in (("stream", None), ("gpu", "int8"), ("gpu", None), ("cpu", None)):
        if (text == "stream" and not in_turns) or (of_text and key is None):
            continue
        plan = replace(PLAN, quantization=key, text_quantization=of_text, in_turns=in_turns, text=text)
        pipe = wan.from_pretrained(checkpoint, half, "cuda", torch.bfloat16, plan=plan)
        for _ in range(2):
            video = pipe.generate("a cat", **SETTINGS).astype(float)
        assert abs(video - plain).mean() < (40 if key == "int4" else 12)


@pytest.mark.parametrize("budget", (16, 6, 4))
def test_a_decode_keeps_to_its_limit_in_as_many_columns_as_it_takes(budget):
    video = VideoSettings((768, 512), 33)
    vae = random_checkpoint.random_vae("kandinsky5-lite", GPU)
    prepare_decoder(vae, torch.float16)
    latents = torch.randn(1, 16, *video.latents_size, device=GPU)
    limit(GPU, MemoryBudget(int(budget * GB), 0, 0))
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        frames = decode(vae, latents)
    assert frames.shape[2:] == (33, 512, 768) and frames.isfinite().all()
    assert torch.cuda.max_memory_allocated() < budget * GB
    assert vae.use_tiling is (budget * GB < decode_bytes(decoding_of(video.size, 33, torch.float16)))
