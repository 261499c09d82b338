"""What the backends hand to the kernels of a GPU for a backward, seen on a CPU by plain functions in their place."""

from __future__ import annotations

import math
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import nabla
from nabla import NablaConfig, backends
from nabla.backends import cudnn, flex, flex_graph, flex_options
from nabla.block_lists import BlockLists, from_lists


def masked_scores(q, k, kept, valid):
    block = q.shape[2] // kept.shape[-1]
    mask = kept.repeat_interleave(block, -1).repeat_interleave(block, -2) & valid
    return (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)


def cudnn_scores(q, k, q2k_block_index, q2k_block_nums, block_sizes, sparse_block_size):
    kept = from_lists(BlockLists(q2k_block_nums, q2k_block_index))
    sizes = torch.full(kept.shape[-1:], sparse_block_size) if block_sizes is None else block_sizes
    return masked_scores(q, k, kept, (torch.arange(sparse_block_size) < sizes[:, None]).flatten())


def cudnn_forward(q, k, v, **sparsity):
    scores = cudnn_scores(q, k, **sparsity)
    return {"o_tensor": (scores.softmax(-1) @ v).contiguous(), "lse_tensor": scores.logsumexp(-1)}


def cudnn_backward(gradient, q, k, v, out, lse, **sparsity):
    """The formulas of FlashAttention-2 (arXiv 2307.08691, section 3.1), of what the forward left alone."""
    assert gradient.stride(-1) == 1 and not any(x.requires_grad for x in (gradient, q, k, v, out, lse))
    p = (cudnn_scores(q, k, **sparsity) - lse[..., None]).exp()
    ds = p * (gradient @ v.mT - (gradient * out).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
    found = (ds @ k, q), (ds.mT @ q, k), (p.mT @ gradient, v)
    return {f"d{name}_tensor": torch.empty_like(like).copy_(x) for name, (x, like) in zip("qkv", found)}


def flex_forward(q, k, v, counts, indices, partial_counts, partial_indices, valid, options, transposed, sums):
    lists = [BlockLists(counts, indices)]
    if partial_counts is not None:
        lists.append(BlockLists(partial_counts, partial_indices))
    if transposed is not None:
        pairs = zip(lists, (BlockLists(*transposed[:2]), BlockLists(*transposed[2:])))
        assert all(torch.equal(from_lists(a).mT, from_lists(b)) for a, b in pairs)
    valid = torch.ones(q.shape[2], dtype=torch.bool) if valid is None else valid
    return masked_scores(q, k, from_lists(*lists), valid).softmax(-1) @ v


@pytest.fixture(params=("cudnn", "flex"))
def backend(request, monkeypatch):
    """The name of a backend whose kernels are replaced by the functions above."""
    library = types.ModuleType("cudnn.block_sparse_attention")
    library.block_sparse_attention_forward, library.block_sparse_attention_backward = cudnn_forward, cudnn_backward
    monkeypatch.setitem(sys.modules, "cudnn", types.ModuleType("cudnn"))
    monkeypatch.setitem(sys.modules, "cudnn.block_sparse_attention", library)
    monkeypatch.setattr(flex_graph, "_compiled", lambda: flex_forward)
    monkeypatch.setattr(flex_options, "for_backward", lambda *kind: {})
    monkeypatch.setattr(backends, "_verified", {})
    for module in (cudnn, flex):
        monkeypatch.setattr(module, "unsupported_reason", lambda *kind: "")
        monkeypatch.setattr(module, "backward_unsupported_reason", lambda *kind: "")
        monkeypatch.setattr(module, "DTYPES", None)
        monkeypatch.setattr(module, "HEAD_SIZES", None)
    return request.param


@pytest.mark.parametrize("grid", ((2, 11, 18), (2, 16, 16)))
@pytest.mark.parametrize("algorithm", ("nabla-0.4", "sta-1-3-1"))
def test_gradients_are_the_reference_s_however_they_are_taken(backend, grid, algorithm):
    generator = torch.Generator().manual_seed(0)
    shape = 1, math.prod(grid), 2, 16
    *qkv, weight = (torch.randn(shape, generator=generator).requires_grad_() for _ in range(4))
    config = replace(NablaConfig.parse(algorithm), backend=backend)
    plan, slow = (nabla.plan(grid, c, "cpu", trains=True) for c in (config, replace(config, backend="reference")))
    compiled = torch.compile(nabla.attend, backend="aot_eager", fullgraph=True, dynamic=False)
    wanted = torch.autograd.grad(nabla.attend(*qkv, slow), qkv, weight.detach())
    for result in (
        nabla.attend(*qkv, plan),
        compiled(*qkv, plan),
        checkpoint(nabla.attend, *qkv, plan, use_reentrant=False),
        checkpoint(compiled, *qkv, plan, use_reentrant=False),
    ):
        for gradient, exact in zip(torch.autograd.grad(result, qkv, weight.detach()), wanted):
            torch.testing.assert_close(gradient, exact, atol=2e-5, rtol=1e-4)


def test_a_gradient_that_was_expanded_is_taken(backend):
    layout = nabla.plan((1, 16, 16), NablaConfig(keep=0.5), "cpu").selection.layout
    module = backends.BACKENDS[backend]
    q, k, v = (torch.randn(1, 2, 256, 16, requires_grad=True) for _ in range(3))
    blocks = module.prepare(torch.eye(4, dtype=torch.bool)[None, None], layout)
    module.attend(q, k, v, blocks).sum().backward()
    torch.testing.assert_close(v.grad.sum(), torch.tensor(2 * 256 * 16.0))
