"""Plans of memory of Kandinsky-5 at the real sizes, and its estimates against tensors counted without any memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from counted import Counted

from nabla import InputError
from wan.config.settings import VideoSettings
from wan.memory.estimates import GIB, decode_bytes, forward_bytes, text_bytes
from wan.memory.planner import FRAGMENTS, GB, MemoryBudget, MemoryPlan, choose
from wan.models.kandinsky import processor
from wan.models.kandinsky.latents import decode
from wan.models.kandinsky.random_checkpoint import weigh_models
from wan.models.kandinsky.random_sizes import MODELS, meta_transformer, meta_vae, workload_for
from wan.models.kandinsky.random_text import meta_qwen
from wan.models.kandinsky.vae import decoding_of, prepare_decoder, split_picture

HOST = MemoryBudget(0, 120 * GIB, 128 * GIB)
LITE, PRO = "kandinsky5-lite", "kandinsky5-pro"
TEN_SECONDS, HD = VideoSettings((768, 512), 241), VideoSettings((1280, 768), 121)
VIDEOS = {LITE: TEN_SECONDS, PRO: HD}


def plan_for(
    model: str, gpu: float, host: MemoryBudget = HOST, video: VideoSettings | None = None, **given
) -> MemoryPlan:
    sizes, budget = MODELS[model], replace(host, gpu=int(gpu * GB))
    workload = workload_for(sizes, video or VIDEOS[model], torch.bfloat16)
    return choose(*weigh_models(sizes, torch.bfloat16), workload, budget, **given)


def test_weights_are_those_of_the_published_models():
    """In bfloat16 with modulations in float32, as CLIP is, which lies beside the language model."""
    for model, gb, block in ((LITE, 4.57, 136e6), (PRO, 43.39, 688e6)):
        transformer, text, vae = weigh_models(MODELS[model], torch.bfloat16)
        # Text blocks count as visual ones, which are larger by a third.
        assert gb < transformer.bytes(None) / GB < 1.02 * gb
        assert transformer.block(None) == pytest.approx(block, rel=0.01)
        assert text.bytes(None) / GB == pytest.approx(14.63, abs=0.01) and vae / GB == pytest.approx(0.99, abs=0.01)


def test_modulations_stay_in_float32_where_weights_are_quantised():
    transformer, _, _ = weigh_models(MODELS[PRO], torch.bfloat16)
    modulation = 9 * 4096 * 1024
    assert transformer.linear == 8 * 4096**2 + 2 * 4096 * 16384 and transformer.largest == 4096 * 16384
    assert 4 * modulation < transformer.other < 4.1 * modulation
    assert transformer.block("int8") == pytest.approx(1.02 * transformer.linear + 4 * modulation, rel=0.01)


@pytest.mark.parametrize("tiles", (1, 3, 8))
@pytest.mark.parametrize("size", ((768, 512), (1280, 768)))
@torch.no_grad()
def test_a_decode_takes_a_little_less_than_its_estimate(size, tiles, monkeypatch):
    (width, height), frames = size, 33
    vae = meta_vae(MODELS[LITE])
    prepare_decoder(vae, torch.float16)
    # In the place of the choice by a GPU's memory.
    monkeypatch.setattr("wan.models.kandinsky.latents.set_tiles", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda _: True)
    if tiles > 1:
        split_picture(vae, size, tiles)
    with Counted() as counted:
        video = decode(vae, torch.empty(1, 16, (frames + 3) // 4, height // 8, width // 8, device="meta"))
    assert video.shape == (1, 3, frames, height, width)
    expected = decode_bytes(decoding_of(size, frames, torch.float16), tiles)
    assert counted.peak <= expected < 1.2 * counted.peak


@pytest.mark.parametrize("model", VIDEOS)
@torch.no_grad()
def test_a_forward_takes_less_than_its_estimate(model, monkeypatch):
    """Two blocks, not compiled and dense, attention itself left out, which needs no more than its result."""
    monkeypatch.setattr(processor, "dispatch_attention_fn", lambda q, k, v, **_: torch.empty_like(q))
    sizes, video = MODELS[model], VIDEOS[model]
    transformer = meta_transformer(sizes, layers=2)
    kept = set(transformer._keep_in_fp32_modules)
    for name, parameter in transformer.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if set(name.split(".")) & kept else torch.bfloat16)
    processor.install_processors(transformer)
    transformer.time_embeddings.freqs = transformer.time_embeddings.freqs.to("meta")
    half = {"device": "meta", "dtype": torch.bfloat16}
    positions = [torch.arange(n, device="meta") for n in (*video.token_grid, 256)]
    with Counted() as counted:
        transformer(
            torch.empty(1, *video.latents_size, 33, **half),
            torch.empty(1, 256, 3584, **half),
            torch.empty(1, device="meta"),
            torch.empty(1, 768, **half),
            positions[:3],
            positions[3],
            return_dict=False,
        )
    workload = replace(workload_for(sizes, video, torch.bfloat16), compiled=False)
    assert counted.peak <= forward_bytes(workload) < 1.4 * counted.peak


@torch.no_grad()
def test_the_language_model_takes_less_than_its_estimate():
    encoder, ids = meta_qwen(MODELS[PRO].qwen).to(torch.bfloat16), torch.empty(2, 385, dtype=torch.int64, device="meta")
    with Counted() as counted:
        encoder(input_ids=ids, use_cache=False)
    assert counted.peak < text_bytes(workload_for(MODELS[PRO], HD, torch.bfloat16))


@pytest.mark.parametrize(
    "model, gpu, in_turns, kept, text, tiles",
    (
        (LITE, 80, False, 34, "gpu", 1),
        (LITE, 48, False, 34, "gpu", 1),
        (LITE, 24, True, 34, "gpu", 1),
        (LITE, 16, True, 34, "gpu", 1),
        (LITE, 12, True, 34, "stream", 2),
        (LITE, 8, True, 34, "stream", 3),
        (PRO, 80, True, 64, "gpu", 1),
        (PRO, 48, True, 0, "gpu", 1),
        (PRO, 24, True, 0, "gpu", 2),
        (PRO, 16, True, 0, "gpu", 3),
        (PRO, 12, True, 0, "stream", 4),
    ),
)
def test_each_card_gets_a_plan_in_full_precision_that_fits(model, gpu, in_turns, kept, text, tiles):
    plan = plan_for(model, gpu)
    assert plan.quantization is None and plan.text_quantization is None and plan.slowdown < 1.05
    assert set(plan.stages) == {"text", "sampling", "decoding"}
    assert max(plan.stages.values()) * (1 + FRAGMENTS) <= gpu * GB and plan.host <= HOST.host
    assert (plan.in_turns, plan.kept, plan.text, plan.tiles) == (in_turns, kept, text, tiles)


def test_little_host_memory_takes_quantised_weights():
    found = {}
    for free in (64, 48, 36):
        plan = plan_for(PRO, 24, MemoryBudget(0, free * GIB, 2 * free * GIB))
        found[free] = plan.quantization, plan.text_quantization
        assert plan.host <= free * GIB and max(plan.stages.values()) * (1 + FRAGMENTS) <= 24 * GB
    assert found == {64: (None, "int8"), 48: ("int8", "int8"), 36: ("int4", "int8")}


def test_float8_is_planned_where_it_is_asked_for():
    plan = plan_for(PRO, 48, quantization="fp8")
    assert plan.quantization == "fp8" and plan.kept == 64 and plan.peak * (1 + FRAGMENTS) <= 48 * GB


@pytest.mark.parametrize(
    "model, gpu, host", ((PRO, 8, HOST), (LITE, 4, HOST), (PRO, 24, MemoryBudget(0, 16 * GIB, 32 * GIB)))
)
def test_what_does_not_fit_is_refused_in_a_line_with_what_would_do(model, gpu, host):
    with pytest.raises(InputError, match="would do") as refused:
        plan_for(model, gpu, host)
    said, (width, height) = str(refused.value), VIDEOS[model].size
    assert f"{VIDEOS[model].frame_num} frames of {width}*{height} do not fit into {gpu}.0 GB" in said
    assert "\n" not in said
    if host is HOST:
        needed = float(said.split("free; ")[1].split(" GB")[0])
        assert plan_for(model, needed).peak <= needed * GB


@pytest.mark.parametrize("model", VIDEOS)
def test_less_memory_is_never_planned_to_take_more(model):
    costs = [plan_for(model, gpu).cost for gpu in range(14, 90, 4)]
    assert costs == sorted(costs, reverse=True)
