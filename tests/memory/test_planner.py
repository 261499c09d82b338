"""Plans of memory at the real sizes, without loading anything, against what was measured and what is allowed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nabla import InputError
from wan.config.settings import VideoSettings
from wan.memory import budget
from wan.memory.estimates import (
    GIB,
    Weights,
    Workload,
    decode_bytes,
    forward_bytes,
    pinned_bytes,
    pinned_chunks,
    tile_width,
)
from wan.memory.planner import FRAGMENTS, GB, MemoryBudget, MemoryPlan, choose
from wan.memory.transfers import slowdown
from wan.memory.weigh import weigh
from wan.models.wan.random_checkpoint import MODELS, meta_text_encoder, meta_transformer
from wan.models.wan.vae import decoding_of
from wan.quantize.gguf import GGUF

HOST = MemoryBudget(0, 120 * GIB, 128 * GIB)
VAE_BYTES = GIB // 2


def models_of(model: str) -> tuple[Weights, Weights]:
    transformer, text = meta_transformer(MODELS[model]), meta_text_encoder(MODELS[model])
    return (
        weigh(transformer, transformer.blocks, torch.bfloat16, transformer._keep_in_fp32_modules),
        weigh(text, text.encoder.block, torch.bfloat16, ()),
    )


@pytest.fixture(scope="module")
def weights() -> dict[str, tuple[Weights, Weights]]:
    return {model: models_of(model) for model in ("t2v-14B", "t2v-1.3B")}


def workload_for(model: str, size: tuple[int, int], frames: int) -> Workload:
    grid, sizes = VideoSettings(size, frames).token_grid, MODELS[model]
    tokens = grid[0] * grid[1] * grid[2]
    return Workload(
        tokens, sizes.dim, sizes.ffn_dim, sizes.heads, sizes.text_dim, decoding_of(size, frames, torch.float16)
    )


def plan_for(weights, model, size, gpu, frames=81, host=HOST, **given) -> MemoryPlan:
    budget = replace(host, gpu=int(gpu * GB))
    return choose(*weights[model], VAE_BYTES, workload_for(model, size, frames), budget, **given)


def test_weights_and_peaks_are_those_that_were_measured(weights):
    """Of one forward and one decode on a GPU, see docs/benchmarks.md: never below, at most a tenth above."""
    transformer, text = weights["t2v-14B"]
    assert transformer.bytes(None) / GIB == pytest.approx(26.67, abs=0.01)
    assert text.bytes(None) / GIB == pytest.approx(10.6, abs=0.1)
    for packing, size, frames, measured in (
        (None, (1280, 640), 81, 30.5),
        (None, (1280, 720), 81, 31.1),
        (None, (1280, 768), 81, 31.3),
        (None, (1280, 720), 241, 41.2),
        ("fp8", (1280, 720), 81, 18.1),
    ):
        expected = (transformer.bytes(packing) + forward_bytes(workload_for("t2v-14B", size, frames))) / GIB
        assert measured <= expected < 1.1 * measured
    workload = workload_for("t2v-14B", (1280, 720), 81)
    masks = forward_bytes(replace(workload, mask_layers=40)) - forward_bytes(workload)
    assert masks / GIB == pytest.approx(2.4, abs=0.1)
    for dtype, measured in ((torch.float16, 9.7), (torch.float32, 20.7)):
        expected = (decode_bytes(decoding_of((1280, 720), 81, dtype)) + VAE_BYTES) / GIB
        assert measured <= expected < 1.15 * measured


@pytest.mark.parametrize("model", ("t2v-14B", "t2v-1.3B"))
@pytest.mark.parametrize(
    "gpu, size",
    ((80, (1280, 720)), (48, (1280, 720)), (24, (1280, 720)), (16, (1280, 720)), (12, (1280, 720)), (8, (832, 480))),
)
def test_each_card_gets_a_plan_in_full_precision_that_fits(weights, model, gpu, size):
    plan = plan_for(weights, model, size, gpu)
    assert plan.quantization is None and plan.text_quantization is None and plan.slowdown < 1.05
    assert plan.peak * (1 + FRAGMENTS) <= gpu * GB and plan.host <= HOST.host
    assert plan.in_turns is not (gpu == 80 or (model == "t2v-1.3B" and gpu >= 48))
    assert set(plan.stages) == {"text", "sampling", "decoding"}
    described = plan.describe(replace(HOST, gpu=gpu * GB), "bfloat16")
    assert "transformer bfloat16" in described and f"expected peak {plan.peak / GIB:.1f} of" in described
    assert "\n" not in described


def test_what_the_14b_does_at_each_size_of_card(weights):
    plans = {gpu: plan_for(weights, "t2v-14B", (1280, 720), gpu) for gpu in (48, 24, 16, 12)}
    assert [plans[gpu].kept for gpu in (48, 24, 16, 12)] == [40, 0, 0, 0]
    assert [plans[gpu].text for gpu in (48, 24, 16, 12)] == ["gpu", "gpu", "gpu", "stream"]
    assert [plans[gpu].tiles for gpu in (48, 24, 16)] == [1, 1, 1] and plans[12].tiles == 2
    assert all(plan.pinned for plan in plans.values())


def test_few_tokens_take_packed_weights_where_transfers_would_take_longer(weights):
    picture = plan_for(weights, "t2v-14B", (1280, 720), 24, frames=1)
    assert picture.quantization == "int8" and picture.kept == 40
    assert plan_for(weights, "t2v-14B", (1280, 720), 40, frames=1).quantization is None


def test_little_host_memory_takes_packed_weights_and_none_is_refused(weights):
    packings = []
    for free in (64, 40, 32, 24):
        plan = plan_for(weights, "t2v-14B", (832, 480), 12, host=MemoryBudget(0, free * GIB, 2 * free * GIB))
        packings.append((plan.quantization, plan.text_quantization))
    assert packings == [(None, None), ("int8", None), ("int8", "int8"), ("int4", "int8")]
    with pytest.raises(InputError, match="with 16.0 GiB of host memory free; .* GB of the GPU .* or .* of host memory"):
        plan_for(weights, "t2v-14B", (832, 480), 12, host=MemoryBudget(0, 16 * GIB, 32 * GIB))


def test_weights_wait_unpinned_where_they_would_fill_the_host(weights):
    plan = plan_for(weights, "t2v-14B", (1280, 720), 16, host=MemoryBudget(0, 48 * GIB, 50 * GIB))
    assert plan.quantization is not None or not plan.pinned
    asked = plan_for(weights, "t2v-14B", (1280, 720), 16, host=MemoryBudget(0, 48 * GIB, 50 * GIB), can_quantize=False)
    assert not asked.pinned and "pageable" in asked.describe(HOST, "bfloat16")


def test_transfers_from_pageable_memory_take_four_times_as_long(weights):
    transformer, _ = weights["t2v-14B"]
    few, many = (replace(workload_for("t2v-14B", (832, 480), 81), tokens=tokens) for tokens in (8_000, 32_000))
    for workload, pinned, times in ((few, True, 2), (few, False, 8), (many, True, 1), (many, False, 2)):
        assert slowdown(transformer, None, workload, 0, pinned) == pytest.approx(times)
    assert slowdown(transformer, None, many, 20, False) == 1
    roomy, tight = (MemoryBudget(0, free * GIB, total * GIB) for free, total in ((120, 128), (48, 50)))
    plans = [plan_for(weights, "t2v-14B", (832, 480), 16, host=host, can_quantize=False) for host in (roomy, tight)]
    assert [(plan.pinned, plan.kept > 0) for plan in plans] == [(True, False), (False, True)]
    assert plans[1].slowdown > 1.05 and "times as long" in plans[1].describe(HOST, "bfloat16")


def test_models_take_turns_rather_than_that_the_picture_is_decoded_in_columns(weights):
    """Their way to the GPU costs a hundredth, columns a twentieth."""
    plans = {gpu: plan_for(weights, "t2v-1.3B", (1920, 1072), gpu) for gpu in (25, 27, 41)}
    assert [(plan.in_turns, plan.tiles > 1) for plan in plans.values()] == [
        (False, True),
        (True, False),
        (False, False),
    ]
    assert [plan.cost for plan in plans.values()] == pytest.approx([1.05, 1.01, 1.0])


def test_what_is_asked_for_is_kept(weights):
    plan = plan_for(weights, "t2v-14B", (1280, 720), 24, quantization="fp8")
    assert plan.quantization == "fp8" and plan.kept == 40 and "transformer fp8" in plan.describe(HOST, "bfloat16")
    plan = plan_for(weights, "t2v-14B", (1280, 720), 16, text_cpu=True)
    assert plan.text == "cpu" and plan.stages["text"] == 0


def test_a_video_that_cannot_fit_is_refused_with_what_would(weights):
    with pytest.raises(InputError, match=r"free; (\d+\.\d) GB of the GPU \(for \w+\) would do") as refused:
        plan_for(weights, "t2v-14B", (1280, 720), 5)
    said = str(refused.value)
    assert "81 frames of 1280*720" in said and "--size" in said and "\n" not in said
    needed = float(said.split("free; ")[1].split(" GB")[0])
    assert plan_for(weights, "t2v-14B", (1280, 720), needed).peak <= needed * GB
    with pytest.raises(InputError):
        plan_for(weights, "t2v-14B", (1280, 720), needed - 0.2)


def test_the_named_number_of_gb_is_enough_with_what_cuda_holds(weights, monkeypatch):
    monkeypatch.setattr(budget, "free_bytes", lambda _: 80 * GB)
    monkeypatch.setattr(budget, "host_bytes", lambda: (HOST.host, HOST.host_total))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: GB // 10)
    workload = workload_for("t2v-14B", (1280, 720), 81)

    def plan_within(gb: float) -> MemoryPlan:
        return choose(*weights["t2v-14B"], VAE_BYTES, workload, budget.budget_of(torch.device("cuda"), gb))

    with pytest.raises(InputError, match=r"do not fit into 5.0 GB of the GPU .* GB of the GPU \(for") as refused:
        plan_within(5)
    needed = float(str(refused.value).split("free; ")[1].split(" GB")[0])
    assert plan_within(needed).peak <= needed * GB
    with pytest.raises(InputError):
        plan_within(needed - 0.2)


def test_a_gguf_file_stays_as_it_is_packed(weights):
    transformer, text = weights["t2v-14B"]
    five_bits = replace(transformer, stored=transformer.other + transformer.linear * 11 // 16)
    for gpu, kept in ((24, 40), (12, 0)):
        limits = replace(HOST, gpu=gpu * GB)
        plan = choose(five_bits, text, VAE_BYTES, workload_for("t2v-14B", (1280, 720), 81), limits, GGUF.key)
        assert (plan.quantization, plan.text_quantization, plan.kept) == (GGUF.key, None, kept)
        assert "loading" not in plan.stages and "transformer gguf, " in plan.describe(limits, "bfloat16")
    whole = choose(
        five_bits, text, VAE_BYTES, workload_for("t2v-14B", (832, 480), 81), replace(HOST, gpu=80 * GB), GGUF.key
    )
    assert not whole.in_turns and whole.host > five_bits.bytes(GGUF.key)


def test_less_memory_is_never_planned_to_take_more(weights):
    costs = [plan_for(weights, "t2v-14B", (1280, 720), gpu).cost for gpu in range(10, 90, 4)]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("block, blocks", ((702_880_000, 40), (93_000_000, 30), (1000, 3), (2**20, 4), (5 * GIB, 2)))
def test_chunks_hold_all_blocks_and_waste_little(block, blocks):
    chunks = pinned_chunks(block, blocks)
    assert sum(chunks) == blocks and min(chunks) > 0
    assert block * blocks <= pinned_bytes(block, blocks) <= 2 * (block + 256) * blocks
    if blocks > 20:
        assert pinned_bytes(block, blocks) < 1.1 * block * blocks


@pytest.mark.parametrize("width", (1280, 832, 480, 1024))
def test_columns_cover_the_picture(width):
    for tiles in range(2, 9):
        column = tile_width(width, tiles)
        assert column % 16 == 0 and (column - 64) * tiles >= width > (column - 64) * (tiles - 1) - 16 * tiles
