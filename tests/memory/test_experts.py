"""Two models that take turns compute what they compute alone, the second prepared while the first finishes or not."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import nn

from wan.attention.compile import compile_blocks
from wan.caches.apply import apply_cache
from wan.caches.ran import blocks_left_out
from wan.config.cache_settings import CacheSettings
from wan.memory.placement import experts_on_device
from wan.memory.streaming import stream_blocks
from wan.models.wan.processor import TRANSFORMER
from wan.models.wan.random_checkpoint import random_transformer

CPU = torch.device("cpu")
LAYERS = 4
# Which of two models runs in each step, of two forwards each.
TURNS, FORWARDS = (0, 0, 1, 1), 2


@pytest.fixture
def pair() -> list[nn.Module]:
    return [random_transformer("nano", torch.float32, CPU, seed, layers=LAYERS) for seed in (1, 2)]


@pytest.fixture
def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 16, 2, 8, 8, generator=generator), torch.randn(1, 512, 64, generator=generator)
    return latents, torch.tensor([500]), text


def walk(pair, inputs, prepares=True, offload=True, seen=lambda step, forward: None) -> list[torch.Tensor]:
    """The outputs of all forwards of a walk down the steps, each of inputs of its own."""
    results = []
    with torch.no_grad(), experts_on_device(pair, CPU, offload) as experts:
        for step, number in enumerate(TURNS):
            model = experts.turn_to(number)
            if prepares and step + 1 < len(TURNS) and TURNS[step + 1] != number:
                experts.prepare(TURNS[step + 1], FORWARDS)
            for forward in range(FORWARDS):
                latents, *others = inputs
                results.append(model(latents + step, *others, return_dict=False)[0])
                seen(step, forward)
    return results


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def stream_both(pair: list[nn.Module], kept: int) -> list:
    return [stream_blocks(model, model.blocks, CPU, kept, left_out=blocks_left_out) for model in pair]


@pytest.mark.parametrize("kept", (0, 1, 3, LAYERS))
def test_streamed_models_take_turns_as_whole_ones_do_and_kept_blocks_are_handed_over(pair, inputs, kept):
    plain = walk(pair, inputs)
    first, second = stream_both(pair, kept)
    held, brought = [], []

    def look(step: int, forward: int) -> None:
        held.append((len(first.whole), len(second.received), len(second.whole)))
        if (step, forward) == (1, 1):
            brought.extend(memory.data_ptr() for memory in second.received.values())
        if step == 2:
            # In the memory that the first one had, filled already.
            assert [second.whole[n].data_ptr() for n in range(kept)] == brought
            assert all(torch.equal(second.whole[n], second.host[n]) for n in range(kept))

    # Again, since a second video begins with the first one.
    for _ in range(2):
        held.clear(), brought.clear()
        assert equal(walk(pair, inputs, seen=look), plain)
        # Nothing is given before the last forward of the first one has begun, and never are both there.
        assert held == [(kept, 0, 0)] * 3 + [(0, kept, 0)] + [(0, 0, kept)] * 4
        assert not any((stream.whole, stream.buffers, stream.received) != ({}, [], {}) for stream in (first, second))
    assert equal(walk(pair, inputs, prepares=False), plain)


def test_models_that_move_as_a_whole_and_those_that_stay_take_turns(pair, inputs):
    alone = [pair[n](inputs[0] + step, *inputs[1:], return_dict=False)[0] for step, n in enumerate(TURNS)]
    for offload in (True, False):
        results = walk(pair, inputs, offload=offload)
        assert equal(results[::FORWARDS], alone) and equal(results[1::FORWARDS], alone)


def test_models_that_move_as_a_whole_are_never_both_there():
    pair = [nn.Linear(2, 2), nn.Linear(2, 2)]
    with experts_on_device(pair, torch.device("meta"), offload=True) as experts:
        for number in (0, 1, 1, 0):
            assert experts.turn_to(number) is pair[number]
            experts.prepare(1 - number, forwards=2)
            assert [model.weight.is_meta for model in pair] == [number == 0, number == 1]
    assert not any(model.weight.is_meta for model in pair)


@pytest.mark.parametrize("last", ((1, 0), (1, 1), (2, 0)))
def test_a_walk_that_ends_early_leaves_all_weights_where_they_wait(pair, inputs, last):
    plain, streams = walk(pair, inputs), stream_both(pair, 2)
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in pair]

    def stop(step: int, forward: int) -> None:
        if (step, forward) == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walk(pair, inputs, seen=stop)
    assert not any(stream.whole or stream.buffers or stream.received for stream in streams)
    for model, state in zip(pair, before):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert equal(walk(pair, inputs), plain)


def test_an_error_within_the_last_forward_leaves_all_weights_where_they_wait(pair, inputs, monkeypatch):
    plain, streams = walk(pair, inputs), stream_both(pair, LAYERS)
    with monkeypatch.context() as patch:
        calls = []
        block, whole = pair[0].blocks[2].ffn, pair[0].blocks[2].ffn.forward
        patch.setattr(block, "forward", lambda x: whole(x) if calls.append(1) or len(calls) < 4 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            walk(pair, inputs)
    assert not any(stream.whole or stream.received for stream in streams)
    assert equal(walk(pair, inputs), plain)


@pytest.mark.parametrize("cache", ("first_block", "taylorseer"))
@pytest.mark.parametrize("kept", (1, LAYERS))
def test_blocks_that_a_step_cache_leaves_out_of_the_last_forward_are_handed_over_too(pair, inputs, cache, kept):
    limits = {"interval": 2} if cache == "taylorseer" else {"threshold": 1e6, "max_skips": 2}

    def video(models: list[nn.Module]) -> list[torch.Tensor]:
        caches = [apply_cache(model, CacheSettings(cache, warmup=0, **limits), TRANSFORMER) for model in models]
        results = []
        for one in caches:
            one.begin(len(TURNS), 0)
        with torch.no_grad(), experts_on_device(models, CPU, offload=True) as experts:
            for step, number in enumerate(TURNS):
                model = experts.turn_to(number)
                if step == 1:
                    experts.prepare(1, FORWARDS)
                for branch in ("prompt", "negative"):
                    with caches[number].branch(branch, step):
                        results.append(model(*inputs, return_dict=False)[0])
        assert caches[0].reused == 2
        return results

    plain = video([random_transformer("nano", torch.float32, CPU, seed, layers=LAYERS) for seed in (1, 2)])
    stream_both(pair, kept)
    assert equal(video(pair), plain)


def test_models_of_other_sizes_are_brought_as_their_turn_comes(inputs):
    pair = [random_transformer("nano", torch.float32, CPU, layers=layers) for layers in (2, 4)]
    plain = walk(pair, inputs)
    pair[1].blocks[0].register_buffer("more", torch.zeros(100_000))
    for model, kept in zip(pair, (2, 3)):
        stream_blocks(model, model.blocks, CPU, kept)
    received = []
    heir = pair[1].block_stream
    assert equal(walk(pair, inputs, seen=lambda *_: received.append(set(heir.received))), plain)
    assert received[3] == {1}


def test_a_block_that_was_handed_over_does_not_run_again(pair, inputs):
    stream_both(pair, LAYERS)
    with experts_on_device(pair, CPU, offload=True) as experts, torch.no_grad():
        model = experts.turn_to(0)
        experts.prepare(1, forwards=1)
        model(*inputs)
        with pytest.raises(RuntimeError, match="block 0 runs again after it was handed over"):
            model(*inputs)


def test_compiled_blocks_stay_one_graph_while_they_are_handed_over(pair, inputs):
    for model in pair:
        compile_blocks(model.blocks)
    plain = walk(pair, inputs)
    stream_both(pair, LAYERS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert equal(walk(pair, inputs), plain)


@pytest.mark.parametrize("which", ((0, 1), (0,), (1,)))
def test_adapters_beside_the_weights_go_with_them(pair, inputs, which):
    config = LoraConfig(r=4, target_modules=["to_q", "to_v", "net.2"], init_lora_weights=False)
    for number in which:
        pair[number].add_adapter(config)
    plain = walk(pair, inputs)
    stream_both(pair, 3)
    assert equal(walk(pair, inputs), plain)
