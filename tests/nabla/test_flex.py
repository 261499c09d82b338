"""Compiled FlexAttention: equal to the reference, and never dense attention in its place."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nabla
from nabla import InputError, NablaConfig, backends
from nabla.backends import flex
from nabla.tiling import TileLayout

FLEX = NablaConfig(threshold=0.5, backend="flex")
REFERENCE = replace(FLEX, backend="reference")


def random_qkv(grid, heads=2, dim=32, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, math.prod(grid), heads, dim, generator=generator) for _ in range(3))


@pytest.fixture(autouse=True)
def fresh_check(monkeypatch):
    """Each test checks the backend anew and leaves no verdict behind."""
    monkeypatch.setattr(backends, "_verified", {})


@pytest.mark.parametrize("grid", ((2, 11, 18), (2, 16, 16)))
@pytest.mark.parametrize("algorithm", ("nabla-0.5", "nabla-0.3_sta-1-3-1", "sta-3-1-1", "keep-0.3"))
def test_equals_reference(algorithm, grid):
    config = NablaConfig.parse(algorithm)
    qkv = random_qkv(grid, heads=3, batch=2)
    exact = nabla.attention(*qkv, grid, replace(config, backend="reference"))
    dense = nabla.attention(*qkv, grid, NablaConfig())
    result = nabla.attention(*qkv, grid, replace(config, backend="flex"))
    assert (result - exact).abs().max() < 1e-5
    assert (dense - exact).abs().max() > 1e-2


def test_more_grids_in_one_process_than_the_caller_lets_functions_be_compiled_for():
    with torch._dynamo.config.patch(recompile_limit=1):
        for columns in (9, 16, 17):
            grid = (2, 8, columns)
            qkv = random_qkv(grid, heads=1, dim=16, seed=columns)
            difference = nabla.attention(*qkv, grid, FLEX) - nabla.attention(*qkv, grid, REFERENCE)
            assert difference.abs().max() < 1e-5, grid


def test_forced_eager_mode_is_a_clear_error():
    grid = (2, 8, 16)
    plan = nabla.plan(grid, FLEX, "cpu")
    with torch.compiler.set_stance("force_eager"):
        with pytest.raises(RuntimeError, match="needs torch.compile, which is switched off"):
            nabla.attend(*random_qkv(grid), plan)
        backends._verified.clear()
        with pytest.raises(InputError, match="flex does not work on cpu.*switched off.*use backend: reference"):
            nabla.plan(grid, FLEX, "cpu")


def test_compilation_switched_off_is_a_clear_error():
    code = (
        "import torch, nabla\n"
        "qkv = [torch.randn(1, 256, 1, 16) for _ in range(3)]\n"
        "nabla.attention(*qkv, (2, 8, 16), nabla.NablaConfig(threshold=0.5, backend='flex'))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TORCHDYNAMO_DISABLE": "1"},
        cwd=Path(nabla.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "needs torch.compile, which is switched off" in run.stderr.splitlines()[-1]


@pytest.mark.parametrize("backend", ("inductor", "aot_eager", "eager"))
@pytest.mark.parametrize("grid", ((2, 11, 18), (2, 8, 16)))
def test_inside_a_compiled_caller(backend, grid):
    """Also where the caller's graph is executed as it is, which would take FlexAttention's dense path."""
    qkv, plan = random_qkv(grid), nabla.plan(grid, FLEX, "cpu")
    result = torch.compile(nabla.attend, backend=backend, fullgraph=True, dynamic=False)(*qkv, plan)
    assert (result - nabla.attention(*qkv, grid, REFERENCE)).abs().max() < 1e-5


def test_training_takes_the_reference_or_says_that_flex_cannot():
    grid = (1, 8, 16)
    qkv = [x.requires_grad_() for x in random_qkv(grid)]
    with pytest.raises(InputError, match="flex does not work on cpu: has no backward on cpu; use backend: auto"):
        nabla.attention(*qkv, grid, FLEX)
    nabla.attention(*qkv, grid, replace(FLEX, backend="auto")).sum().backward()
    assert qkv[0].grad.abs().sum() > 0


def test_a_plan_for_inference_does_not_train_on_a_kernel_whose_gradients_were_not_checked():
    plan = nabla.plan((1, 8, 16), FLEX, "cpu")
    qkv = [x.requires_grad_() for x in random_qkv((1, 8, 16))]
    with pytest.raises(InputError, match="this plan is for inference.*give trains=True to nabla.plan"):
        nabla.attend(*qkv, plan)
    with torch.no_grad():
        nabla.attend(*qkv, plan)


def test_auto_on_a_cpu_is_gather_until_flex_has_passed():
    auto = replace(FLEX, backend="auto")
    grid = (1, 8, 16)
    assert nabla.plan(grid, auto, "cpu").backend == "gather"
    assert nabla.plan(grid, FLEX, "cpu").backend == "flex"
    assert nabla.plan(grid, auto, "cpu").backend == "flex"
    double = [x.double() for x in random_qkv(grid)]
    assert nabla.attention(*double, grid, auto).dtype == torch.float64
    with pytest.raises(InputError, match="flex does not take torch.float64"):
        nabla.attention(*double, grid, FLEX)


def test_a_backend_that_answers_with_dense_attention_fails_its_check(monkeypatch):
    def dense(q, k, v, blocks, means):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr(flex, "attend", dense)
    assert "off by" in backends.verify("flex", torch.device("cpu"), 64)
    with pytest.raises(InputError, match="flex does not work on cpu: its result is off by"):
        nabla.plan((1, 8, 16), FLEX, "cpu")


def test_prepared_lists_cover_each_kept_block_once():
    layout = TileLayout.build((1, 12, 20), (1, 8, 8), "cpu")
    kept = torch.rand(1, 2, layout.blocks, layout.blocks, generator=torch.Generator().manual_seed(0)) > 0.5
    blocks = flex.prepare(kept, layout)
    assert torch.equal(blocks.partial.counts + blocks.full.counts, kept.sum(-1, dtype=torch.int32))
