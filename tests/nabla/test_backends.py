"""Which kernel `auto` takes, what it says, and that a kernel that answers wrongly is never used."""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import nabla
from nabla import InputError, NablaConfig, backends
from nabla.backends import cudnn, reference

GRID, CONFIG = (1, 8, 16), NablaConfig(threshold=0.5)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def kernel(**changed):
    """A backend that is the reference but for what is changed."""
    return types.SimpleNamespace(**{**vars(reference), **changed})


@pytest.fixture
def install(monkeypatch):
    def install(**kernels):
        for module in (backends, sys.modules["nabla.attention"]):
            monkeypatch.setattr(module, "BACKENDS", {**kernels, "reference": reference})
        monkeypatch.setattr(backends, "_verified", {})

    return install


def test_a_cpu_takes_gather_and_says_why():
    line = nabla.plan(GRID, CONFIG, "cpu").describe()
    assert "backend gather, grid" in line
    assert "cudnn: needs an NVIDIA GPU of compute capability 9.0 or more; flex: compiles for long on a CPU" in line


def test_a_backend_that_is_named_and_cannot_run_is_one_line():
    with pytest.raises(InputError, match="backend cudnn does not work on cpu: needs an NVIDIA GPU.*use backend: auto"):
        nabla.plan(GRID, replace(CONFIG, backend="cudnn"), "cpu")


def test_the_first_that_can_do_it_and_passes_is_taken(install):
    install(fast=kernel(), slow=kernel())
    assert backends.choose("auto", CPU, 64) == ("fast", "the fastest that passed its check")
    install(fast=kernel(unsupported_reason=lambda *kind: "not installed"), slow=kernel())
    assert backends.choose("auto", CPU, 64) == ("slow", "the fastest that passed its check; fast: not installed")
    install(fast=kernel(DTYPES=(torch.bfloat16,)), small=kernel(HEAD_SIZES=(64,)), slow=kernel())
    name, why = backends.choose("auto", CPU, 64, torch.float32, 128)
    assert name == "slow" and "fast: does not take torch.float32; small: does not take heads of 128" in why


@pytest.mark.parametrize(
    "attend, fault",
    (
        (lambda q, k, v, blocks, means: F.scaled_dot_product_attention(q, k, v), "its result is off by"),
        (lambda q, k, v, blocks, means: torch.full_like(q, torch.nan), "its result is off by nan"),
        (lambda q, k, v, blocks, means: torch.randn(3) @ torch.randn(2), "RuntimeError: inconsistent tensor size"),
        (lambda q, k, v, blocks, means: exec("assert False"), "AssertionError: no message"),
    ),
)
def test_dense_attention_in_place_of_sparse_wrong_values_and_failures_are_found_out_aloud(install, attend, fault):
    install(trap=kernel(attend=attend))
    with pytest.warns(UserWarning, match=f"trap does not work on cpu .{fault}.*using a slower backend"):
        name, why = backends.choose("auto", CPU, 64)
    assert name == "reference" and f"trap: {fault}" in why
    with pytest.raises(InputError, match=f"backend trap does not work on cpu: {fault}"):
        backends.choose("trap", CPU, 64)


def dense_gradients(q, k, v, blocks, means):
    """The reference's values with the gradients of dense attention."""
    dense = F.scaled_dot_product_attention(q, k, v)
    return dense + (reference.attend(q, k, v, blocks) - dense).detach()


def test_a_kernel_with_wrong_gradients_infers_but_does_not_train(install):
    install(trap=kernel(attend=dense_gradients), slow=kernel())
    assert backends.choose("auto", CPU, 64)[0] == "trap"
    with pytest.warns(UserWarning, match="trap does not work on cpu .its gradient of q is off by"):
        assert backends.choose("auto", CPU, 64, trains=True)[0] == "slow"
    with pytest.raises(InputError, match="backend trap does not work on cpu: its gradient of q is off by"):
        backends.choose("trap", CPU, 64, trains=True)


def test_a_kernel_without_gradients_infers_but_does_not_train(install):
    def reason(device, dtype, head_size):
        return f"has no backward in {dtype}"

    install(fast=kernel(backward_unsupported_reason=reason), slow=kernel())
    assert backends.choose("auto", CPU, 64, torch.float32)[0] == "fast"
    name, why = backends.choose("auto", CPU, 64, torch.float32, trains=True)
    assert name == "slow" and "fast: has no backward in torch.float32" in why
    assert nabla.plan(GRID, CONFIG, "cpu", trains=True).describe().startswith("nabla-0.5, backend slow with gradients")


def test_each_head_size_has_a_check_of_its_own(install):
    def wrong_if_narrow(q, k, v, blocks, means):
        return reference.attend(q, k, v, blocks) * (1 if q.shape[-1] == 128 else 2)

    install(trap=kernel(attend=wrong_if_narrow))
    assert backends.choose("auto", CPU, 64, head_size=128)[0] == backends.choose("auto", CPU, 64)[0] == "trap"
    with pytest.warns(UserWarning, match="trap does not work on cpu .its result is off by 100"):
        assert backends.choose("auto", CPU, 64, head_size=64)[0] == "reference"


def test_autocast_does_not_spoil_a_check(install):
    install(fast=kernel())
    with torch.autocast("cpu", torch.bfloat16):
        assert backends.choose("auto", CPU, 64)[0] == "fast"


def test_a_plan_whose_backend_cannot_do_what_comes_is_an_error_and_not_slow_in_silence(install):
    install(fast=kernel(HEAD_SIZES=(128,)))
    q = torch.randn(1, 128, 1, 64)
    plan = nabla.plan(GRID, CONFIG, "cpu")
    with pytest.raises(InputError, match="backend fast of this plan does not take heads of 64; give dtype and head_"):
        nabla.attend(q, q, q, plan)
    assert nabla.plan(GRID, CONFIG, "cpu", q.dtype, 64).backend == "reference"


def test_what_cudnn_asks_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert cudnn.unsupported_reason(GPU, 64) == "needs an NVIDIA GPU of compute capability 9.0 or more"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert cudnn.unsupported_reason(GPU, 32) == "takes blocks of 64 tokens, not 32"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cudnn.unsupported_reason(GPU, 64) == "not installed, see requirements-cudnn.txt"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert cudnn.unsupported_reason(GPU, 64) == ""
    assert cudnn.backward_unsupported_reason(GPU, torch.bfloat16) == cudnn.backward_unsupported_reason(GPU, None) == ""
    assert cudnn.backward_unsupported_reason(GPU, torch.float16) == "has no backward in torch.float16"
    assert cudnn.unsupported_reason(GPU, 64, torch.float16, 64) == cudnn.unsupported_reason(GPU, 64, None, 96) == ""
    assert cudnn.backward_unsupported_reason(GPU, torch.bfloat16, 64) == "has no backward for heads of 64"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 3))
    assert cudnn.unsupported_reason(GPU, 64, torch.bfloat16, 128) == cudnn.unsupported_reason(GPU, 64) == ""
    narrow, half = (cudnn.unsupported_reason(GPU, 64, *kind) for kind in ((torch.bfloat16, 64), (torch.float16, 128)))
    assert narrow == "takes heads of 128, not 64, on compute capability 10.3"
    assert half == "takes torch.bfloat16, not torch.float16, on compute capability 10.3"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert cudnn.unsupported_reason(GPU, 64, torch.float16, 128) == ""
    assert cudnn.backward_unsupported_reason(GPU, None) == "has no backward on compute capability 12.0 or more"
