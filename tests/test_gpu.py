"""On a CUDA GPU: the fast kernel against float64, the traps, and the whole pipeline."""

from __future__ import annotations

import copy
import math
import sys
import time
from dataclasses import replace
from functools import partial

import diffusers_pipeline
import pytest
import torch
import torch.nn.functional as F
import weight_files
from conftest import relative_error
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

import nabla
import wan
from nabla import NablaConfig, backends
from nabla.backends import cudnn, flex_options, reference
from nabla.block_lists import BlockLists, from_lists, to_lists
from nabla.kernels.block_lists import lists_of_blocks
from nabla.kernels.block_selection import choose_lists
from nabla.kernels.row_selection import Rule, lists_of_map
from nabla.kernels.tile_gather import tiles_and_means
from nabla.rotary import Rotary, rotate
from nabla.selection import Selection, block_means, top_k_mask, top_p_mask
from nabla.tiling import TileLayout
from wan.caches.apply import apply_cache
from wan.config.cache_settings import CacheSettings
from wan.models.kandinsky.random_checkpoint import random_vae as random_kandinsky_vae
from wan.models.kandinsky.vae import prepare_decoder
from wan.models.wan import random_checkpoint
from wan.models.wan.fused_gelu import linear_gelu
from wan.models.wan.latents import decode
from wan.models.wan.processor import TRANSFORMER
from wan.models.wan.random_checkpoint import MODELS, random_transformer
from wan.models.wan.vae import decoder_dtype, speed_up_decoder
from wan.observe import events
from wan.observe.profiler import Profiler
from wan.observe.run_log import read_log

pytestmark = pytest.mark.gpu

AUTO = NablaConfig(threshold=0.5)
FULL, PARTIAL = (3, 32, 32), (3, 30, 52)


def random_qkv(grid, heads=4, dim=128, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = 1, math.prod(grid), heads, dim
    return tuple(torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(3))


def dense_error(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    wide = [x.double() for x in (q, k, v)]
    # Some queries at a time: the scores of the published size would fill most of a card, in float64.
    exact = [F.scaled_dot_product_attention(rows, *wide[1:]) for rows in wide[0].split(4096, dim=2)]
    return relative_error(F.scaled_dot_product_attention(q, k, v).double(), torch.cat(exact, dim=2))


def needs_cudnn(head_size=128):
    if reason := cudnn.unsupported_reason(torch.device("cuda", 0), 64, torch.bfloat16, head_size):
        pytest.skip(f"backend cudnn: {reason}")


@pytest.mark.parametrize("backend, dim", (("flex", 64), ("flex", 128), ("cudnn", 64), ("cudnn", 96), ("cudnn", 128)))
@pytest.mark.parametrize("grid", (FULL, PARTIAL, (21, 45, 80)))
@pytest.mark.parametrize("algorithm", ("nabla-0.4", "keep-0.1", "sta-3-3-3", "nabla-0.2_sta-3-1-3"))
def test_fast_kernels_are_as_exact_as_dense_attention(grid, algorithm, backend, dim):
    if backend == "cudnn":
        needs_cudnn(dim)
    config = replace(NablaConfig.parse(algorithm), backend=backend)
    q, k, v = random_qkv(grid, heads=1 if grid[0] == 21 else 4, dim=dim)
    kept = nabla.attention(q, k, v, grid, config)
    layout = TileLayout.build(grid, config.tile, "cuda")
    blocks = nabla.select_blocks(q, k, grid, config)
    tiles = (layout.to_tiles(x.double()) for x in (q, k, v))
    exact = layout.to_raster(reference.attend(*tiles, reference.prepare(blocks, layout)))
    assert relative_error(kept.double(), exact) < 1.2 * dense_error(q, k, v)


def test_auto_takes_cudnn_where_it_is_and_passes_and_says_why(monkeypatch):
    assert nabla.plan(FULL, AUTO, "cuda", torch.float32).backend == "flex"
    plan = nabla.plan(FULL, AUTO, "cuda", torch.bfloat16, 128)
    if reason := cudnn.unsupported_reason(torch.device("cuda", 0), 64):
        assert plan.backend == "flex" and f"cudnn: {reason}" in plan.describe()
        return
    assert plan.backend == "cudnn" and "the fastest that passed its check" in plan.describe()
    assert nabla.plan(FULL, AUTO, "cuda", torch.bfloat16, 40).backend == "flex"
    monkeypatch.setattr(backends, "_verified", {})
    monkeypatch.setattr(cudnn, "attend", lambda q, k, v, blocks, means: F.scaled_dot_product_attention(q, k, v))
    with pytest.warns(UserWarning, match="cudnn does not work on cuda:0 .its result is off by"):
        plan = nabla.plan(FULL, AUTO, "cuda", torch.bfloat16, 128)
    assert plan.backend == "flex" and "cudnn: its result is off by" in plan.describe()


def test_flex_options_found_by_trial_are_right(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(flex_options, "MEASURED", {})
    flex_options.for_forward.cache_clear()
    q, k, v = random_qkv(PARTIAL)
    flex, slow = (replace(AUTO, backend=name) for name in ("flex", "reference"))
    assert relative_error(nabla.attention(q, k, v, PARTIAL, flex), nabla.attention(q, k, v, PARTIAL, slow)) < 1e-2
    assert torch.cuda.get_device_name() in (tmp_path / "nabla" / "flex_options.json").read_text()
    flex_options.for_forward.cache_clear()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("grid, heads, dim", ((PARTIAL, 12, 128), (PARTIAL, 14, 64), (FULL, 5, 96), (FULL, 3, 40)))
def test_gather_rotates_and_averages_as_the_slow_way(grid, heads, dim, dtype):
    x, angles, _ = random_qkv(grid, heads, dim, dtype)
    angles = angles[:, :, :1, : dim // 2].float().repeat_interleave(2, -1)
    layout = TileLayout.build(grid, (1, 8, 8), "cuda")
    for rotary in (None, Rotary(angles.cos(), angles.sin())):
        tiles, means = tiles_and_means(x, layout, rotary)
        slow = layout.to_tiles(x if rotary is None else rotate(x, rotary))
        if dtype != torch.float32:  # of which the rotation rounds once where the slow way rounds twice
            assert (tiles == slow).float().mean() > 0.999
        torch.testing.assert_close(tiles, slow, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        torch.testing.assert_close(means, block_means(tiles, layout), rtol=1e-5, atol=1e-6)


def test_nine_grids_in_one_process():
    for columns in range(9, 18):
        grid = (2, 8, columns)
        q, k, v = random_qkv(grid)
        exact = nabla.attention(q, k, v, grid, replace(AUTO, backend="reference"))
        assert relative_error(nabla.attention(q, k, v, grid, AUTO), exact) < 1e-2, grid


def test_forced_eager_mode_is_a_clear_error_and_auto_falls_to_the_reference_aloud(monkeypatch):
    monkeypatch.setattr(backends, "_verified", {})
    q, k, v = random_qkv(PARTIAL)
    with torch.compiler.set_stance("force_eager"):
        with pytest.warns(UserWarning, match="switched off.*using a slower backend"):
            plan = nabla.plan(PARTIAL, AUTO, "cuda", torch.float32)
        assert plan.backend == "reference"
        with pytest.raises(RuntimeError, match="switched off"):
            nabla.attend(q, k, v, replace(plan, backend="flex"))


def test_inside_a_compiled_caller():
    q, k, v = random_qkv(PARTIAL)
    plan = nabla.plan(PARTIAL, AUTO, "cuda")
    result = torch.compile(nabla.attend, fullgraph=True, dynamic=False)(q, k, v, plan)
    exact = nabla.attention(q, k, v, PARTIAL, replace(AUTO, backend="reference"))
    assert relative_error(result, exact) < 1e-2


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_other_dtypes(dtype):
    q, k, v = random_qkv(PARTIAL, dtype=dtype)
    exact = nabla.attention(q, k, v, PARTIAL, replace(AUTO, backend="reference"))
    assert relative_error(nabla.attention(q, k, v, PARTIAL, AUTO), exact) < 5e-3


LIMITED = "nabla-0.6_min-0.05_max-0.2"


@pytest.mark.parametrize(
    "algorithm", ("nabla-0.02", "nabla-0.7", "nabla-1.0", "keep-0.13", "nabla-0.5_sta-3-3-3", LIMITED)
)
@pytest.mark.parametrize("grid, heads", (((21, 40, 80), 100), ((21, 45, 80), 100), ((61, 45, 80), 5)))
def test_lists_of_a_map_keep_what_the_rule_says(algorithm, grid, heads):
    """Over a million rows in all, against the rule in float64 and against the sort."""
    generator = torch.Generator("cuda").manual_seed(0)
    selection = Selection.build(grid, NablaConfig.parse(algorithm), "cuda")
    cut, count, window, layout = selection.cut, selection.count, selection.window, selection.layout
    full = layout.full if layout.has_partial_tiles else None
    for spread in (0.3, 3.0):
        scores = spread * torch.randn(1, heads, layout.blocks, layout.blocks, device="cuda", generator=generator)
        counts = torch.empty(1 if full is None else 2, 1, heads, layout.blocks, dtype=torch.int32, device="cuda")
        indices = torch.empty(*counts.shape, layout.blocks, dtype=torch.int32, device="cuda")
        rule = Rule(full, cut, count, selection.least, selection.most, window)
        lists_of_map(scores, rule, counts, indices)
        lists = [from_lists(BlockLists(*pair)) for pair in zip(counts, indices)]
        if full is not None:
            assert not (lists[0] & ~full).any() and not (lists[1] & full).any()
        kept = lists[0] if full is None else lists[0] | lists[1]

        by_sort = scores.softmax(-1)
        limits = selection.least, selection.most
        by_sort = top_k_mask(by_sort, count) if cut is None else top_p_mask(by_sort, cut, *limits)
        by_sort = by_sort if window is None else by_sort | window
        # Where float32 rounds two probabilities to one, or a sum to the cut, the neighbour at the edge may be kept.
        differ = (kept != by_sort).sum(-1)
        assert differ.max() <= 2 and (differ > 0).float().mean() < 1e-3
        if window is not None:
            continue
        probability = scores.double().softmax(-1)
        edge = probability.where(kept, 2.0).amin(-1)
        assert (probability.where(~kept, 0.0).amax(-1) <= edge * (1 + 1e-6)).all()
        if cut is None:
            assert (kept.sum(-1) == count).all()
        elif limits != (None, None):
            # Some rows of a sharp map meet the floor, and all of a flat one the cap.
            assert (kept.sum(-1) >= selection.least).all() and (kept.sum(-1) <= selection.most).all()
        else:
            dropped = (probability * ~kept).sum(-1)
            assert (dropped <= cut + 1e-6).all() and (dropped + edge >= cut - 1e-6).all()


@pytest.mark.parametrize("grid", (FULL, PARTIAL))
def test_fast_selection_is_the_slow_one(grid):
    q, k, _ = random_qkv(grid, dtype=torch.float32)
    config = NablaConfig.parse("nabla-0.4_sta-1-3-1")
    selection = Selection.build(grid, config, "cuda")
    slow = selection.block_mask(*(block_means(selection.layout.to_tiles(x), selection.layout) for x in (q, k)))
    assert (nabla.select_blocks(q, k, grid, config) != slow).float().mean() < 1e-4


@pytest.mark.parametrize("algorithm", ("keep-0.2", "nabla-0.5"))
def test_a_grid_of_one_block(algorithm):
    q, k, v = random_qkv((1, 8, 8))
    dense = nabla.attention(q, k, v, (1, 8, 8), NablaConfig())
    assert relative_error(nabla.attention(q, k, v, (1, 8, 8), NablaConfig.parse(algorithm)), dense) < 1e-2


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_keeps_the_fast_kernel(random_nano, dtype):
    pipe = wan.WanT2V.from_pretrained(random_nano, AUTO, "cuda", torch.float32, compile=False)
    latents, text = torch.randn(1, 16, 3, 26, 32, device="cuda"), torch.randn(1, 512, 64, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", dtype):
        out = pipe.transformer(latents, torch.tensor([500], device="cuda"), text, return_dict=False)[0]
    assert out.isfinite().all()
    (plan,) = pipe.transformer.nabla.plans.by_size.values()
    assert plan.backend != "reference"


@pytest.mark.parametrize("blocks", (1, 63, 64, 1260, 1320))
def test_lists_of_blocks_are_the_slow_ones(blocks):
    generator = torch.Generator("cuda").manual_seed(0)
    kept, full = (torch.rand(n, blocks, blocks, device="cuda", generator=generator) > 0.8 for n in (3, 1))
    kept, full = kept.view(1, 3, blocks, blocks), full[0, 0]
    for split, slow in ((None, [kept]), (full, [kept & full, kept & ~full])):
        for lists, wanted in zip(lists_of_blocks(kept, split), map(to_lists, slow)):
            assert torch.equal(lists.counts, wanted.counts) and torch.equal(from_lists(lists), from_lists(wanted))


def test_ties_are_dropped_from_the_lowest_number_up():
    grid = (1, 8, 64)
    q = torch.randn(1, 512, 1, 64, device="cuda")
    k = torch.ones(1, 512, 1, 64, device="cuda")
    selection = Selection.build(grid, NablaConfig(threshold=0.6), "cuda")
    (lists,) = choose_lists(*(block_means(selection.layout.to_tiles(x), selection.layout) for x in (q, k)), selection)
    assert (lists.counts == 5).all() and (lists.indices[..., :5] == torch.arange(3, 8, device="cuda")).all()


@pytest.mark.parametrize(
    "probability, kept",
    (
        ((1 / 2, 1 / 16, 1 / 4, 1 / 8, 1 / 16), (True, False, True, True, False)),
        ((1 / 8,) * 8, (False,) + (True,) * 7),
    ),
)
def test_a_block_with_which_the_sum_is_the_cut_exactly_is_kept(probability, kept):
    blocks = len(kept)
    scores = torch.tensor(probability, device="cuda").log().expand(1, 1, blocks, blocks).contiguous()
    counts = torch.empty(1, 1, 1, blocks, dtype=torch.int32, device="cuda")
    indices = torch.empty(*counts.shape, blocks, dtype=torch.int32, device="cuda")
    lists_of_map(scores, Rule(cut=torch.tensor(1 / 4, device="cuda")), counts, indices)
    assert (from_lists(BlockLists(counts[0], indices[0])).cpu() == torch.tensor(kept)).all()


def test_selection_is_the_cpu_s():
    q, k, _ = random_qkv(PARTIAL, dtype=torch.float32)
    on_gpu = nabla.select_blocks(q, k, PARTIAL, AUTO).cpu()
    on_cpu = nabla.select_blocks(q.cpu(), k.cpu(), PARTIAL, AUTO)
    assert (on_gpu != on_cpu).float().mean() < 1e-4


def test_published_size_needs_little_memory_beside_its_tensors():
    grid = (21, 45, 80)
    q, k, v = random_qkv(grid, heads=40)
    plan = nabla.plan(grid, NablaConfig(keep=0.1), "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nabla.attend(q, k, v, plan)
    assert torch.cuda.max_memory_allocated() - before < 8 * 2**30


def test_few_heads_at_a_time_give_the_same(monkeypatch):
    for backend, dim in (("flex", 128), ("flex", 64), ("cudnn", 128), ("cudnn", 64), ("cudnn", 96)):
        q, k, v = random_qkv(PARTIAL, heads=5, dim=dim)
        if backend == "cudnn":
            needs_cudnn(dim)
        config = replace(AUTO, backend=backend)
        whole = nabla.attention(q, k, v, PARTIAL, config)
        monkeypatch.setattr(sys.modules["nabla.attention"], "LIST_ENTRIES", 3 * 84**2)
        assert torch.equal(nabla.attention(q, k, v, PARTIAL, config), whole)
        monkeypatch.undo()


def test_gelu_in_the_epilogue_is_as_exact_as_a_pass_of_its_own():
    x, weight, bias = (random_qkv((1, 1, n), 1, 256)[0].view(-1, 256) for n in (300, 512, 2))
    weight, bias = weight / 16, bias.flatten()
    exact = F.gelu(x.double() @ weight.double().T + bias.double(), approximate="tanh")
    apart = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    assert relative_error(linear_gelu(x, weight, bias).double(), exact) < 1.2 * relative_error(apart.double(), exact)


def test_float8_layers_follow_bf16(random_nano):
    pytest.importorskip("torchao")
    settings = dict(size=(256, 208), frame_num=9, seed=1, steps=2)
    plain = wan.WanT2V.from_pretrained(random_nano, AUTO, "cuda", torch.bfloat16)
    pipe = wan.WanT2V.from_pretrained(random_nano, AUTO, "cuda", torch.bfloat16, fp8=True)
    assert abs(pipe.generate("a cat", **settings).astype(float) - plain.generate("a cat", **settings)).mean() < 12
    assert "Float8" in type(pipe.transformer.blocks[0].ffn.net[2].weight).__name__


def test_a_lora_under_float8_and_compiled_blocks_is_the_lora_merged(random_nano, tmp_path):
    pytest.importorskip("torchao")
    model = random_transformer("nano", torch.float32, torch.device("cpu"))
    lora = [str(weight_files.write_lora(tmp_path / "style.safetensors", weight_files.draw_factors(model)))]
    settings = dict(size=(256, 208), frame_num=9, seed=1, steps=2)
    plain = wan.WanT2V.from_pretrained(random_nano, AUTO, "cuda", torch.bfloat16, lora=lora)
    pipe = wan.WanT2V.from_pretrained(random_nano, AUTO, "cuda", torch.bfloat16, fp8=True, lora=lora)
    assert abs(pipe.generate("a cat", **settings).astype(float) - plain.generate("a cat", **settings)).mean() < 12
    assert "Float8" in type(pipe.transformer.blocks[0].ffn.net[2].weight).__name__


@pytest.mark.parametrize("cache", ("first_block:1e6", "mag:0.3", "taylorseer:2"))
def test_step_caches_in_compiled_blocks_follow_those_in_float32(random_nano, cache):
    ratios = {"ratios": (1.0,) * 6} if cache.startswith("mag") else {}
    settings = dict(size=(256, 208), frame_num=9, seed=1, steps=6)
    videos, reused = [], []
    for dtype, compiles in ((torch.float32, False), (torch.bfloat16, True)):
        pipe = wan.WanT2V.from_pretrained(random_nano, AUTO, "cuda", dtype, compile=compiles, cache="none")
        applied = apply_cache(pipe.transformer, CacheSettings.parse(cache, **ratios), TRANSFORMER)
        videos.append(pipe.generate("a cat", **settings).astype(float))
        again = pipe.generate("a cat", **settings)
        assert (again == videos[-1]).all()
        reused.append(applied.reused)
    assert reused[0] == reused[1] > 0
    assert abs(videos[0] - videos[1]).mean() < 12


@pytest.mark.parametrize("offload", (False, True))
def test_gguf_with_a_lora_follows_its_weights_unpacked(random_nano, tmp_path, offload):
    pytest.importorskip("gguf")
    model = random_transformer("nano", torch.float32, torch.device("cpu"))
    lora = [str(weight_files.write_lora(tmp_path / "style.safetensors", weight_files.draw_factors(model)))]
    state = load_file(next(random_nano.glob("*.safetensors")))
    save_file(weight_files.write_gguf(tmp_path / "a.gguf", state), tmp_path / "exact.safetensors")
    settings = dict(size=(256, 208), frame_num=9, seed=1, steps=2)
    videos = []
    for name in ("a.gguf", "exact.safetensors"):
        pipe = wan.WanT2V.from_pretrained(
            random_nano, AUTO, "cuda", torch.bfloat16, offload, transformer=tmp_path / name, lora=lora
        )
        videos.append(pipe.generate("a cat", **settings).astype(float))
    assert abs(videos[0] - videos[1]).mean() < 12


@pytest.mark.parametrize("offload", (False, True))
def test_the_pipeline_of_diffusers_with_a_lora_and_offloaded_blocks_equals_ours(nano, tmp_path, offload):
    device = torch.device("cuda", 0)
    model = wan.WanT2V.from_pretrained(nano, "dense", "cpu").transformer
    lora = weight_files.write_lora(tmp_path / "style.safetensors", weight_files.draw_factors(model), "diffusers")
    prepare = partial(diffusers_pipeline.offload_blocks, device=device) if offload else lambda transformer: None
    exact = diffusers_pipeline.own_latents(nano, lora, device)
    latents = diffusers_pipeline.latents_of_diffusers(nano, lora, prepare, device)
    assert relative_error(latents, exact) < 1e-4


def test_the_fast_decoder_is_the_published_one_within_45_db():
    torch.manual_seed(0)
    with torch.device("cuda"):
        vae = AutoencoderKLWan().eval().requires_grad_(False)
    latents = torch.randn(1, 16, 4, 30, 52, device="cuda")
    exact = decode(vae, latents)
    speed_up_decoder(vae, torch.float16)
    assert decoder_dtype(vae) == torch.float16
    error = (decode(vae, latents) - exact).square().mean().item()
    assert 10 * math.log10(4 / error) > 45


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-4), (torch.float16, 2e-2)))
def test_the_fast_layers_of_kandinsky_s_vae_are_diffusers(dtype, tolerance, monkeypatch):
    # In TF32, the default of convolutions, two layouts of the same numbers are rounded to different results.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    exact = random_kandinsky_vae("kandinsky5-nano", torch.device("cuda"))
    fast = copy.deepcopy(exact)
    prepare_decoder(fast, dtype)
    latents, video = torch.randn(2, 16, 3, 8, 12, device="cuda"), torch.rand(2, 3, 5, 64, 96, device="cuda")
    with torch.no_grad():
        assert relative_error(fast.decoder(latents.to(dtype)).float(), exact.decoder(latents)) < tolerance
        assert relative_error(fast.encoder(video), exact.encoder(video)) < 1e-4


@pytest.mark.parametrize("offload", (False, True))
def test_pipeline_in_bf16_follows_float32(random_nano, offload):
    settings = dict(size=(256, 208), frame_num=9, seed=1, steps=4)
    exact = wan.WanT2V.from_pretrained(random_nano, AUTO, "cuda", torch.float32).generate("a cat", **settings)
    pipe = wan.WanT2V.from_pretrained(random_nano, AUTO, "cuda", torch.bfloat16, offload=offload)
    video = pipe.generate("a cat", **settings)
    assert video.shape == (9, 208, 256, 3)
    assert abs(video.astype(float) - exact).mean() < 12
    assert next(pipe.transformer.parameters()).is_cuda is not offload


def test_compiled_blocks_give_the_same_in_one_graph(random_nano):
    settings = dict(size=(256, 208), frame_num=9, seed=1)
    plain = wan.WanT2V.from_pretrained(random_nano, AUTO, "cuda", torch.bfloat16, compile=False)
    pipe = wan.WanT2V.from_pretrained(random_nano, AUTO, "cuda", torch.bfloat16)
    first = pipe.generate("a cat", **settings, steps=2)
    assert abs(first.astype(float) - plain.generate("a cat", **settings, steps=2)).mean() < 12
    with torch._dynamo.config.patch(error_on_recompile=True):
        pipe.generate("a dog", **settings, steps=3, solver="dpm++", shift=3.0)
        wan.apply_attention(pipe.transformer, replace(AUTO, threshold=0.3))
        pipe.generate("a dog", **settings, steps=1)


def test_masks_kept_for_steps_compile_one_graph_more_and_no_others(random_nano):
    settings = dict(size=(256, 208), frame_num=9, seed=1)
    pipe = wan.WanT2V.from_pretrained(random_nano, replace(AUTO, mask_refresh=2), "cuda", torch.bfloat16)
    pipe.generate("a cat", **settings, steps=3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        pipe.generate("a dog", **settings, steps=4)


def test_more_sizes_than_the_default_recompile_limit(random_nano):
    pipe = wan.WanT2V.from_pretrained(random_nano, AUTO, "cuda", torch.bfloat16)
    for width in range(32, 32 + 16 * 9, 16):
        assert pipe.generate("a cat", size=(width, 32), frame_num=1, steps=1).shape == (1, 32, width, 3)


@pytest.mark.parametrize("backend", ("flex", "cudnn"))
def test_a_recorder_times_what_runs_in_compiled_blocks(random_nano, backend, tmp_path, monkeypatch):
    if backend == "cudnn":
        needs_cudnn()
        monkeypatch.setitem(random_checkpoint.MODELS, "large heads", replace(MODELS["nano"], dim=256))
        random_checkpoint.write("large heads", tmp_path / "checkpoint", torch.float32)
    checkpoint = random_nano if backend == "flex" else tmp_path / "checkpoint"
    config = NablaConfig(threshold=0.5, window=(1, 1, 3), backend=backend)
    pipe = wan.WanT2V.from_pretrained(checkpoint, config, "cuda", torch.bfloat16)
    recorder = wan.Recorder(log=tmp_path / "run.jsonl", examples=True)
    settings = dict(size=(416, 240), frame_num=9, seed=1, steps=3, guide_scale=1.0)
    for _ in range(2):
        watched = pipe.generate("a cat", **settings, observer=recorder)
    assert abs(watched.astype(float) - pipe.generate("a cat", **settings)).mean() < 1
    assert read_log(tmp_path / "run.jsonl") == recorder.records
    layers = [record for record in recorder.records if record["kind"] == "layer"]
    assert len(layers) == 3 * len(pipe.transformer.blocks)
    for one in layers:
        assert one["kernel"] == backend and 0 < one["kept"]["min"] <= one["kept"]["max"] < 1
        assert one["mask_ms"] > 0 and one["attention_ms"] > 0
        assert one["mask_ms"] + one["attention_ms"] <= one["block_ms"] * 1.01
    for step in (record for record in recorder.records if record["kind"] == "step"):
        assert step["ms"] >= sum(one["block_ms"] for one in layers if one["step"] == step["step"]) * 0.99
        assert step["memory"]["gpu_peak_gib"] >= step["memory"]["gpu_gib"] > 0
    last = {one["layer"]: one["kept"] for one in layers if one["step"] == 2}
    for example in recorder.examples:
        assert example.blocks.mean() == pytest.approx(example.density, abs=1e-5)
        assert example.density in (pytest.approx(last[example.layer][which], abs=1e-5) for which in ("min", "max"))


def test_watching_costs_less_than_a_percent_of_a_step():
    """Of four layers of the 14B at 832x480 with 10% kept, which is little beside most videos."""
    transformer = random_transformer("t2v-14B", torch.bfloat16, torch.device("cuda"), layers=4)
    wan.attention.compile.compile_blocks(transformer.blocks)
    wan.apply_attention(transformer, NablaConfig(keep=0.1))
    latents = torch.randn(1, 16, 21, 60, 104, device="cuda", dtype=torch.bfloat16)
    text, timestep = torch.randn(1, 512, 4096, device="cuda", dtype=torch.bfloat16), torch.tensor([500], device="cuda")

    def seconds(profiler) -> float:
        times = []
        for step in range(8):
            torch.cuda.synchronize()
            start = time.perf_counter()
            if profiler is not None:
                profiler.begin_step(step)
            with torch.no_grad():
                transformer(latents, timestep, text, return_dict=False)
            trace = profiler.end_step() if profiler is not None else None
            torch.cuda.synchronize()
            if trace is not None:
                events.step_events(trace, timed=True)
            times.append(time.perf_counter() - start)
        return min(times[2:])

    plain = seconds(None)
    with Profiler([transformer], TRANSFORMER, torch.device("cuda", 0), times=True) as profiler:
        watched = seconds(profiler)
    print(f"a step of four layers: {1000 * plain:.1f} ms, watched {1000 * watched:.1f} ms")
    assert min(seconds(None), plain) * 1.01 > watched
