"""Plans of memory of all of Wan's models at their published sizes, and estimates against tensors that were counted."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from counted import Counted
from diffusers.models.transformers import transformer_wan
from torch import nn

from nabla import InputError
from wan.config.geometry import Geometry
from wan.config.settings import Settings, VideoSettings, resolve
from wan.memory.estimates import FLOAT32_BYTES, GIB, Workload, decode_bytes, forward_bytes
from wan.memory.planner import FRAGMENTS, GB, MemoryBudget, MemoryPlan, choose
from wan.memory.weigh import weigh
from wan.models.wan.memory import workload_of
from wan.models.wan.processor import blocks_of
from wan.models.wan.random_sizes import (
    MODELS,
    meta_picture_tower,
    meta_text_encoder,
    meta_transformer,
    meta_vae,
    others_of,
    weigh_models,
)
from wan.models.wan.random_sizes import workload_for as largest_workload
from wan.quantize.table import QUANTIZATIONS

HOST = MemoryBudget(0, 120 * GIB, 128 * GIB)
HD, SD = VideoSettings((1280, 720)), VideoSettings((832, 480))
NAMES = ("i2v-14B", "flf2v-14B", "vace-1.3B", "vace-14B", "t2v-A14B", "i2v-A14B", "ti2v-5B")
VIDEOS = dict.fromkeys(NAMES, HD) | {
    "vace-1.3B": SD,
    "ti2v-5B": VideoSettings((1280, 704), 121, geometry=Geometry((4, 16, 16))),
}


@functools.cache
def transformer_of(model: str, layers: int | None = None) -> nn.Module:
    return meta_transformer(MODELS[model], layers)


@functools.cache
def vae_of(model: str) -> nn.Module:
    return meta_vae(MODELS[model])


@functools.cache
def text_encoder() -> nn.Module:
    return meta_text_encoder(MODELS["t2v-14B"])


def settings_for(model: str, video: VideoSettings | None = None, picture: bool = True) -> Settings:
    plain = resolve({"prompt": "a cat", "checkpoint": "here"})
    return replace(plain, video=video or VIDEOS[model], image="a.png" if picture else None)


def workload_for(model: str, picture: bool = True, transformer: nn.Module | None = None) -> Workload:
    models = transformer or transformer_of(model), text_encoder(), vae_of(model)
    return workload_of(*models, settings_for(model, picture=picture), torch.bfloat16, torch.float16, None)


def plan_for(model: str, gpu: float, host: MemoryBudget = HOST, **given: int) -> MemoryPlan:
    sizes, budget = MODELS[model], replace(host, gpu=int(gpu * GB))
    return choose(*weigh_models(sizes, torch.bfloat16), workload_for(model), budget, **others_of(sizes) | given)


@pytest.mark.parametrize(
    "model, gib",
    (
        ("i2v-14B", 30.5),
        ("flf2v-14B", 30.5),
        ("vace-1.3B", 4.0),
        ("vace-14B", 32.3),
        ("t2v-A14B", 26.6),
        ("i2v-A14B", 26.6),
        ("ti2v-5B", 9.3),
    ),
)
def test_weights_are_those_of_the_published_models(model, gib):
    """In bfloat16 but for what diffusers keeps in float32."""
    transformer = transformer_of(model)
    blocks = blocks_of(transformer)
    weights = weigh(transformer, blocks, torch.bfloat16, transformer._keep_in_fp32_modules)
    assert weights.bytes(None) / GIB == pytest.approx(gib, abs=0.1)
    largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
    assert 2 * largest < weights.block(None) < 2.02 * largest
    assert (
        weights.streamed(None) < weights.streamed(None, 10) < weights.streamed(None, len(blocks)) == weights.bytes(None)
    )


def test_blocks_of_vace_count_as_they_are_and_the_largest_is_what_buffers_hold():
    transformer = transformer_of("vace-14B")
    own, all_of_them = transformer.blocks, blocks_of(transformer)
    assert [len(blocks) for blocks in (own, all_of_them)] == [40, 48] and all_of_them[0] is transformer.vace_blocks[0]
    plain, both = (weigh(transformer, blocks, torch.bfloat16, ()) for blocks in (own, all_of_them))
    # A projection of its input, and of its output, more.
    assert both.linear == plain.linear + 2 * 5120**2 and both.less_linear == (2 * 40 + 7) * 5120**2
    assert both.bytes(None) == plain.bytes(None)
    # Quantised, what plain blocks do not have is not counted either.
    linear = sum(m.weight.numel() for m in all_of_them.modules() if isinstance(m, nn.Linear))
    half = both.bytes("int8") - both.bytes(None)
    assert half == pytest.approx((QUANTIZATIONS["int8"].bytes_per_weight - 2) * linear, rel=1e-3)


# On a GPU of so many GB: whether models take turns, how many blocks are kept, how the text encoder runs, and in how
# many columns what is given is encoded and the video decoded; None where it does not fit.
PLANS = {
    ("i2v-14B", 12): (True, 0, "stream", 3, 2),
    ("i2v-14B", 16): (True, 0, "gpu", 2, 1),
    ("i2v-14B", 24): (True, 0, "gpu", 1, 1),
    ("i2v-14B", 48): (True, 40, "gpu", 1, 1),
    ("flf2v-14B", 12): (True, 0, "stream", 3, 2),
    ("flf2v-14B", 16): (True, 0, "gpu", 2, 1),
    ("flf2v-14B", 24): (True, 0, "gpu", 1, 1),
    ("flf2v-14B", 48): (True, 40, "gpu", 1, 1),
    ("vace-1.3B", 12): (True, 45, "stream", 1, 1),
    ("vace-1.3B", 16): (True, 45, "gpu", 1, 1),
    ("vace-1.3B", 24): (True, 45, "gpu", 1, 1),
    ("vace-1.3B", 48): (False, 45, "gpu", 1, 1),
    ("vace-14B", 12): None,
    ("vace-14B", 16): None,
    ("vace-14B", 24): (True, 0, "gpu", 2, 1),
    ("vace-14B", 48): (True, 0, "gpu", 1, 1),
    ("t2v-A14B", 12): (True, 0, "stream", 1, 2),
    ("t2v-A14B", 16): (True, 0, "gpu", 1, 1),
    ("t2v-A14B", 24): (True, 0, "gpu", 1, 1),
    ("t2v-A14B", 48): (True, 40, "gpu", 1, 1),
    ("i2v-A14B", 12): (True, 0, "stream", 3, 2),
    ("i2v-A14B", 16): (True, 0, "gpu", 2, 1),
    ("i2v-A14B", 24): (True, 0, "gpu", 1, 1),
    ("i2v-A14B", 48): (True, 40, "gpu", 1, 1),
    ("ti2v-5B", 12): (True, 0, "stream", 1, 2),
    ("ti2v-5B", 16): (True, 30, "gpu", 1, 1),
    ("ti2v-5B", 24): (True, 30, "gpu", 1, 1),
    ("ti2v-5B", 48): (False, 30, "gpu", 1, 1),
}
# CLIP's picture tower in float32.
TOWER = 632_076_800 * FLOAT32_BYTES
# CUDA's own memory, which `--memory` counts too, and torch cannot give out.
BESIDES = 0.7


@pytest.mark.parametrize("model, gpu", PLANS)
def test_each_card_gets_a_plan_in_full_precision_or_a_line_with_what_would_do(model, gpu):
    expected, free = PLANS[model, gpu], gpu - BESIDES
    if expected is None:
        with pytest.raises(InputError, match=f"do not fit into {free} GB") as refused:
            plan_for(model, free)
        needed = float(str(refused.value).split("free; ")[1].split(" GB of the GPU (for sampling)")[0])
        assert needed == pytest.approx(15.7, abs=0.2) and plan_for(model, needed).peak <= needed * GB
        return
    plan = plan_for(model, free)
    assert (plan.in_turns, plan.kept, plan.text, plan.encoding_tiles, plan.tiles) == expected
    assert plan.quantization is None and plan.text_quantization is None and plan.slowdown < 1.05
    assert plan.peak * (1 + FRAGMENTS) <= free * GB and plan.host <= HOST.host
    assert set(plan.stages) == {"text", "sampling", "decoding"} | ({"picture"} if model != "t2v-A14B" else set())
    tiled = f"encoding in {plan.encoding_tiles} overlapping tiles; "
    assert (tiled in plan.describe(HOST, "bfloat16")) is (plan.encoding_tiles > 1)


def test_of_two_experts_one_is_on_the_gpu_at_a_time_and_both_are_on_the_host():
    one, two = (plan_for("t2v-A14B", 48, experts=experts) for experts in (1, 2))
    assert one.stages == two.stages and two.host - one.host > 26.6 * GIB
    assert "2 experts in bfloat16, one at a time on the GPU while it samples; " in two.describe(HOST, "bfloat16")
    assert (two.to_sidecar()["experts"], "experts" in one.to_sidecar()) == (2, False)
    one, two = (plan_for("t2v-A14B", 100, experts=experts) for experts in (1, 2))
    assert two.stages["sampling"] - one.stages["sampling"] > 26.6 * GIB
    assert not two.in_turns and "2 experts in bfloat16, on the GPU throughout; " in two.describe(HOST, "bfloat16")


def test_little_host_memory_takes_quantised_experts():
    found = {}
    for free in (80, 64, 48, 40):
        plan = plan_for("i2v-A14B", 24, MemoryBudget(0, free * GIB, 2 * free * GIB))
        assert plan.host <= free * GIB and plan.pinned
        found[free] = plan.quantization, plan.text_quantization
    assert found == {80: (None, None), 64: ("int8", None), 48: ("int8", "int8"), 40: ("int4", None)}


def test_an_encoder_of_pictures_is_gone_before_the_vae_comes():
    with_tower, without = (plan_for("i2v-14B", 24, picture_bytes=size) for size in (TOWER, 0))
    assert with_tower.stages == without.stages and with_tower.host == without.host + TOWER
    huge = plan_for("i2v-14B", 24, picture_bytes=20 * GB)
    assert huge.stages["picture"] == 20 * GB
    resident, other = (plan_for("i2v-14B", 80, picture_bytes=size) for size in (TOWER, 0))
    assert {resident.stages[stage] - other.stages[stage] for stage in other.stages} == {TOWER}


@pytest.mark.parametrize("model", NAMES)
@torch.no_grad()
def test_a_forward_takes_less_than_its_estimate(model, monkeypatch):
    """Two blocks, not compiled and dense, attention itself left out, which needs no more than its result."""
    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", lambda q, k, v, **_: torch.empty_like(q))
    video = VIDEOS[model]
    transformer = meta_transformer(MODELS[model], layers=2)
    kept = set(transformer._keep_in_fp32_modules)
    for name, parameter in transformer.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if set(name.split(".")) & kept else torch.bfloat16)
    own = transformer.config
    half = {"device": "meta", "dtype": torch.bfloat16}
    workload = replace(workload_for(model, transformer=transformer), compiled=False)
    has_own = model == "ti2v-5B"
    pictures = 2 if own.pos_embed_seq_len else 1
    given = {"encoder_hidden_states_image": torch.empty(pictures, 257, 1280, **half)} if own.image_dim else {}
    if own.get("vace_layers"):
        given["control_hidden_states"] = torch.empty(1, 96, *video.latents_size, **half)
    with Counted() as counted:
        transformer(
            torch.empty(1, own.in_channels, *video.latents_size, **half),
            torch.empty((1, workload.tokens) if has_own else (1,), device="meta"),
            torch.empty(1, 512, 4096, **half),
            **given,
            return_dict=False,
        )
    assert counted.peak <= forward_bytes(workload) < 1.5 * counted.peak


def test_a_picture_costs_what_it_needs_where_one_is_given():
    given, without = workload_for("ti2v-5B"), workload_for("ti2v-5B", picture=False)
    assert without.beside == 0 and without.encoding is None and given.encoding.frames == 1
    # 27,280 tokens, six modulations of 3072 numbers each, in bfloat16 and in float32.
    assert given.tokens == 27_280 and given.beside == 27_280 * 3072 * (6 * 6 + 2)
    assert workload_for("t2v-A14B").encoding is None
    # Wan2.1's encoder sees grey frames too.
    assert decode_bytes(workload_for("i2v-14B").encoding) > 13 * GB and workload_for("vace-14B").beside > 6 * GB


@pytest.mark.parametrize("model", NAMES)
def test_random_models_are_of_the_published_sizes(model):
    """By the numbers of their parameters."""
    published = {"t2v-A14B": 14_288_491_584, "i2v-A14B": 14_288_901_184, "i2v-14B": 16_394_878_784}
    published |= {"flf2v-14B": 16_395_536_704, "vace-1.3B": 2_153_972_032, "vace-14B": 17_337_592_896}
    published |= {"ti2v-5B": 4_999_787_712}
    assert transformer_of(model).num_parameters() == published[model]
    if (tower := MODELS[model].tower) is not None:
        # The published file has, beside what is needed, its head's norm.
        assert TOWER - 4 * meta_picture_tower(tower).num_parameters() in range(0, 4 * 2 * 1280 * 1280)
    if model == "ti2v-5B":
        assert vae_of(model).num_parameters() == 704_688_668
    # Of those that may be given a picture, that of a run without one is smaller.
    assert largest_workload(MODELS[model], VIDEOS[model], torch.bfloat16) == workload_for(model)
