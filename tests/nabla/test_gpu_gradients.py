"""On a CUDA GPU: gradients of the fast kernels against float64, however the caller runs them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from torch.utils.checkpoint import checkpoint

import nabla
import wan
from nabla import NablaConfig, backends
from nabla.attention import ReusableBlockMask
from nabla.backends import cudnn, flex, flex_options, reference
from nabla.block_lists import BlockLists, from_lists, to_lists
from nabla.rotary import Rotary
from nabla.tiling import TileLayout

pytestmark = pytest.mark.gpu

AUTO = NablaConfig(threshold=0.5)
GPU = torch.device("cuda", 0)
FULL, PARTIAL, ODD = (3, 32, 32), (3, 30, 52), (1, 24, 24)
KERNELS = (("flex", 64), ("flex", 128), ("cudnn", 128))


def random_qkv(grid, heads=4, dim=128, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = 1, math.prod(grid), heads, dim
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype).requires_grad_() for _ in range(3)]


def random_weight(grid, heads=4, dim=128, dtype=torch.bfloat16):
    return random_qkv(grid, heads, dim, dtype, seed=1)[0].detach()


def needs(backend):
    if backend == "cudnn":
        reason = cudnn.unsupported_reason(GPU, 64) or cudnn.backward_unsupported_reason(GPU, torch.bfloat16)
        if reason:
            pytest.skip(f"backend cudnn: {reason}")


def exact_gradients(qkv, weight, grid, config):
    """By the reference in float64, over the blocks that the kernel chooses, or all without a config."""
    layout = TileLayout.build(grid, AUTO.tile if config is None else config.tile, qkv[0].device)
    if config is None:
        blocks = torch.ones(1, 1, layout.blocks, layout.blocks, dtype=torch.bool, device=qkv[0].device)
    else:
        blocks = nabla.select_blocks(*(x.detach() for x in qkv[:2]), grid, config)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    out = reference.attend(*(layout.to_tiles(x) for x in wide), reference.prepare(blocks, layout))
    return torch.autograd.grad(layout.to_raster(out), wide, weight.double())


def dense_errors(qkv, weight, grid):
    """What the same dtype costs dense attention's gradients of q, k and v."""
    leaves = [x.detach().transpose(1, 2).requires_grad_() for x in qkv]
    found = torch.autograd.grad(F.scaled_dot_product_attention(*leaves), leaves, weight.transpose(1, 2))
    # Not by dense attention in float64, whose scores at the published size fill a card.
    exact = exact_gradients(qkv, weight, grid, None)
    return [relative_error(a.transpose(1, 2).double(), b) for a, b in zip(found, exact)]


def assert_as_exact_as_dense(found, qkv, weight, grid, config, factor=1.5):
    errors = map(relative_error, (x.double() for x in found), exact_gradients(qkv, weight, grid, config))
    for name, error, dense in zip("qkv", errors, dense_errors(qkv, weight, grid)):
        assert error < factor * dense, f"gradient of {name}: {error:.2e}, of dense attention {dense:.2e}"


@pytest.mark.parametrize("backend, dim", KERNELS)
@pytest.mark.parametrize("grid", (FULL, PARTIAL, ODD, (21, 45, 80)))
@pytest.mark.parametrize("algorithm", ("nabla-0.4", "keep-0.1", "sta-3-3-3", "nabla-0.2_sta-3-1-3"))
def test_fast_kernels_are_as_exact_as_dense_attention(grid, algorithm, backend, dim):
    needs(backend)
    heads = 1 if grid[0] == 21 else 4
    config = replace(NablaConfig.parse(algorithm), backend=backend)
    qkv, weight = random_qkv(grid, heads, dim), random_weight(grid, heads, dim)
    found = torch.autograd.grad(nabla.attention(*qkv, grid, config), qkv, weight)
    assert_as_exact_as_dense(found, qkv, weight, grid, config)


@pytest.mark.parametrize("backend, dim", KERNELS)
def test_of_gradients_that_are_not_contiguous(backend, dim):
    needs(backend)
    config, grid = replace(AUTO, backend=backend), PARTIAL
    qkv, weight = random_qkv(grid, dim=dim), random_weight(grid, dim=dim)
    strided = weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for given in (strided, weight[:, :1, :, :1].expand(weight.shape)):
        found = torch.autograd.grad(nabla.attention(*qkv, grid, config), qkv, given)
        assert_as_exact_as_dense(found, qkv, given.contiguous(), grid, config)
    layout = TileLayout.build(FULL, config.tile, "cuda")
    tiles = [layout.to_tiles(x).detach().requires_grad_() for x in random_qkv(FULL, dim=dim)]
    prepared = backends.BACKENDS[backend].prepare(torch.rand(1, 4, 48, 48, device="cuda") > 0.5, layout)
    given = random_weight(FULL, dim=dim).permute(0, 2, 3, 1).contiguous().transpose(2, 3)
    found = torch.autograd.grad(backends.BACKENDS[backend].attend(*tiles, prepared), tiles, given)
    wanted = torch.autograd.grad(backends.BACKENDS[backend].attend(*tiles, prepared), tiles, given.contiguous())
    assert all(relative_error(a, b) < 1e-2 for a, b in zip(found, wanted))


@pytest.mark.parametrize("backend, dim", KERNELS)
@pytest.mark.parametrize("grid", (FULL, PARTIAL))
def test_in_a_compiled_caller_and_under_checkpointing(grid, backend, dim):
    needs(backend)
    config = replace(AUTO, backend=backend)
    qkv, weight = random_qkv(grid, dim=dim), random_weight(grid, dim=dim)
    angles = random_weight(grid, 1, dim // 2, torch.float32).repeat_interleave(2, -1)
    plan, rotary = (
        nabla.plan(grid, config, "cuda", torch.bfloat16, dim, trains=True),
        Rotary(angles.cos(), angles.sin()),
    )
    blocks = plan.selection.layout.blocks
    block_mask = ReusableBlockMask(torch.zeros(1, 4, blocks, blocks, dtype=torch.bool, device="cuda"), reuse=False)
    wanted = torch.autograd.grad(nabla.attend(*qkv, plan, rotary), qkv, weight)
    attend = torch.compile(nabla.attend, fullgraph=True, dynamic=False)
    for result in (
        attend(*qkv, plan, rotary),
        checkpoint(nabla.attend, *qkv, plan, rotary, block_mask, use_reentrant=False),
        checkpoint(attend, *qkv, plan, rotary, block_mask, use_reentrant=False),
    ):
        chosen = block_mask.mask.clone()
        found = torch.autograd.grad(result, qkv, weight)
        assert torch.equal(block_mask.mask, chosen)
        assert all(relative_error(a, b) < 1e-2 for a, b in zip(found, wanted))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_other_dtypes_train_on_flex(dtype):
    plan = nabla.plan(PARTIAL, AUTO, "cuda", dtype, 128, trains=True)
    assert plan.backend == "flex" and "flex with gradients" in plan.describe()
    qkv, weight = random_qkv(PARTIAL, dtype=dtype), random_weight(PARTIAL, dtype=dtype)
    found = torch.autograd.grad(nabla.attend(*qkv, plan), qkv, weight)
    wanted = torch.autograd.grad(nabla.attention(*qkv, PARTIAL, replace(AUTO, backend="reference")), qkv, weight)
    assert all(relative_error(a, b) < 1e-2 for a, b in zip(found, wanted))


@pytest.mark.parametrize("backend", ("flex", "cudnn"))
def test_autocast_trains_on_the_fast_kernel(backend):
    needs(backend)
    config = replace(AUTO, backend=backend)
    plan = nabla.plan(PARTIAL, config, "cuda", torch.bfloat16, 128, trains=True)
    qkv, weight = random_qkv(PARTIAL, dtype=torch.float32), random_weight(PARTIAL)
    with torch.autocast("cuda", torch.bfloat16):
        out = nabla.attend(*(x.bfloat16() for x in qkv), plan)
    found = torch.autograd.grad(out, qkv, weight)
    assert all(x.dtype == torch.float32 for x in found)
    assert_as_exact_as_dense(found, [x.bfloat16() for x in qkv], weight, PARTIAL, config)


def test_auto_trains_on_flex_where_cudnn_has_no_gradients():
    needs("cudnn")
    plan = nabla.plan(FULL, AUTO, "cuda", torch.bfloat16, 64, trains=True)
    assert plan.backend == "flex" and "cudnn: has no backward for heads of 64" in plan.describe()


def test_auto_trains_on_cudnn_where_its_gradients_are_right_and_says_why_not_where_they_are_wrong(monkeypatch):
    needs("cudnn")
    assert nabla.plan(FULL, AUTO, "cuda", torch.bfloat16, 128, trains=True).backend == "cudnn"
    monkeypatch.setattr(backends, "_verified", {})
    attend = cudnn.attend

    def dense_gradients(q, k, v, blocks, means):
        dense = F.scaled_dot_product_attention(q, k, v)
        return dense + (attend(q, k, v, blocks) - dense).detach()

    monkeypatch.setattr(cudnn, "attend", dense_gradients)
    with pytest.warns(UserWarning, match="cudnn does not work on cuda:0 .its gradient of q is off by"):
        plan = nabla.plan(FULL, AUTO, "cuda", torch.bfloat16, 128, trains=True)
    assert plan.backend == "flex"
    assert nabla.plan(FULL, AUTO, "cuda", torch.bfloat16, 128).backend == "cudnn"


def test_every_option_of_a_flex_backward_that_compiles_is_right(capsys):
    """One line for each, to choose from on a card that is new."""
    times = {}
    for head_size in (64, 128):
        kind = GPU, torch.bfloat16, head_size, 64
        chosen = flex_options.for_backward(*kind, flex._forward_trial, flex._backward_trial)
        given = {name: value for name, value in chosen.items() if not name.startswith("bwd_")}
        inputs = flex._trial_inputs(*kind)
        wanted = flex._differentiate(inputs.q, inputs, chosen)
        for each in flex_options.backward_candidates(torch.bfloat16, 64):
            times[head_size, tuple(each.values())] = seconds = flex._backward_trial(*kind, given | each)
            if seconds < math.inf:
                found = flex._differentiate(inputs.q, inputs, given | each)
                assert all(relative_error(a, b) < 1e-2 for a, b in zip(found, wanted)), each
    with capsys.disabled():
        for (head_size, each), seconds in times.items():
            print(f"\nheads of {head_size}, tiles, warps and stages {each}: {1000 * seconds:.2f} ms", end="")
    assert min(times.values()) < math.inf


@pytest.mark.parametrize("blocks", (1, 84, 1260))
def test_transposed_lists(blocks):
    kept = torch.rand(1, 3, blocks, blocks, device="cuda") > 0.8
    transposed = flex._transpose(*to_lists(kept))
    assert torch.equal(from_lists(BlockLists(*transposed)), kept.mT) and transposed[1].dtype == torch.int32


@pytest.mark.parametrize("backend", ("flex", "cudnn"))
def test_published_size_needs_little_memory_beside_its_tensors(backend):
    needs(backend)
    grid = 21, 45, 80
    qkv, weight = random_qkv(grid, heads=40), random_weight(grid, heads=40)
    plan = nabla.plan(grid, NablaConfig(keep=0.1, backend=backend), "cuda", torch.bfloat16, 128, trains=True)
    attend = torch.compile(nabla.attend, fullgraph=True, dynamic=False)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(*qkv, plan).backward(weight)
    # A tensor is 0.72 GiB: tiles of four, the result, four gradients twice, and cuDNN's sums, of three in float32.
    assert torch.cuda.max_memory_allocated() - before < 20 * 2**30


def test_compiled_and_checkpointed_blocks_train_in_one_graph(random_nano):
    pipe = wan.WanT2V.from_pretrained(random_nano, AUTO, "cuda", torch.bfloat16)
    transformer = pipe.transformer.requires_grad_(True).train()
    latents, text = torch.randn(1, 16, 3, 26, 32, device="cuda").bfloat16(), torch.randn(1, 512, 64, device="cuda")

    def gradients():
        transformer.zero_grad()
        transformer(latents, torch.tensor([500], device="cuda"), text.bfloat16(), return_dict=False)[0].sum().backward()
        return torch.cat([p.grad.flatten().float() for p in transformer.parameters() if p.grad is not None])

    plain = gradients()
    transformer.enable_gradient_checkpointing()
    again = gradients()
    with torch._dynamo.config.patch(error_on_recompile=True):
        gradients()
    assert plain.isfinite().all() and relative_error(again, plain) < 2e-2
    (plan,) = transformer.nabla.plans.by_size.values()
    assert plan.trains and plan.backend != "reference"
