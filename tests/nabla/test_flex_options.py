"""FlexAttention's options are looked for once, remembered, and never ones that do not compile."""

from __future__ import annotations

import json
import math

import pytest
import torch

from nabla.backends import flex_options

OPTIONS = [{"num_warps": 4, "num_stages": n} for n in (1, 2, 3)]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flex_options._read.cache_clear()
    yield tmp_path / "nabla" / "flex_options.json"
    flex_options._read.cache_clear()


def seconds(options):
    """Three stages would be fastest, but do not compile."""
    return {1: 2e-3, 2: 1e-3, 3: math.inf}[options["num_stages"]]


def never(options):
    raise AssertionError("asked for again")


def test_the_fastest_that_compiles_is_remembered_in_the_process_and_on_disk(cache):
    assert flex_options.remembered("a card", OPTIONS, seconds) == OPTIONS[1]
    assert flex_options.remembered("a card", OPTIONS, never) == OPTIONS[1]
    flex_options._read.cache_clear()
    assert flex_options.remembered("a card", OPTIONS, never) == OPTIONS[1]
    with pytest.raises(AssertionError):
        flex_options.remembered("another card", OPTIONS, never)
    assert json.loads(cache.read_text()) == {"a card": OPTIONS[1]}
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


@pytest.mark.parametrize("content", ("{ no JSON", "[" * 100_000, '{"a card": "fast"}', '{"a card": {}}', "[1]"))
def test_a_damaged_file_is_made_anew(cache, content):
    cache.parent.mkdir()
    cache.write_text(content)
    assert flex_options.remembered("a card", OPTIONS, seconds) == OPTIONS[1]
    assert json.loads(cache.read_text()) == {"a card": OPTIONS[1]}


def test_a_disk_that_cannot_be_written_costs_one_trial(cache, caplog):
    cache.parent.write_text("a file where the folder should be")
    assert flex_options.remembered("a card", OPTIONS, seconds) == OPTIONS[1]
    assert "cannot keep the options found" in caplog.text
    assert flex_options.remembered("a card", OPTIONS, never) == OPTIONS[1]


def test_options_of_which_none_compile_are_an_error_and_not_remembered(cache):
    with pytest.raises(RuntimeError, match="no options of FlexAttention compile for a card"):
        flex_options.remembered("a card", OPTIONS[2:], seconds)
    assert not cache.exists()


@pytest.mark.parametrize("block", (32, 64, 128))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_tiles_of_a_backward_divide_each_other_and_the_blocks(dtype, block):
    for each in flex_options.backward_candidates(dtype, block):
        m1, n1, m2, n2 = (each[f"bwd_BLOCK_{name}"] for name in ("M1", "N1", "M2", "N2"))
        assert n1 % m1 == m2 % n2 == block % n1 == block % m2 == 0


def test_options_of_a_backward_hold_those_of_its_forward(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(flex_options, "for_forward", lambda *kind: {"BLOCK_M": 64})
    kind = torch.device("cuda", 0), torch.bfloat16, 128, 64

    def trial(*args):
        return 1.0 if args[-1]["bwd_BLOCK_M1"] == 32 and args[-1]["fwd_BLOCK_M"] == 64 else math.inf

    flex_options.for_backward.cache_clear()
    options = flex_options.for_backward(*kind, never, trial)
    assert options == flex_options.for_backward(*kind, never, trial)
    assert options["fwd_BLOCK_M"] == options["SPARSE_Q_BLOCK_SIZE"] == 64 and options["bwd_BLOCK_M1"] == 32
    flex_options.for_backward.cache_clear()


def test_a_cpu_needs_none():
    assert flex_options.for_forward(torch.device("cpu"), torch.float32, 64, 64, never) == {}
