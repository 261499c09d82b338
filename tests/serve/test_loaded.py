"""A pipeline that stays loaded while the next video wants another LoRA, cache or attention: as if loaded for it."""

from __future__ import annotations

import os

import pytest
import torch
import weight_files

from wan.config.settings import Settings
from wan.memory.streaming import stream_blocks
from wan.models import lora
from wan.models.checkpoint import Checkpoint
from wan.models.wan.random_checkpoint import random_transformer
from wan.run.generation import load_pipeline
from wan.run.request import Options
from wan.serve.workers.loaded import Loaded

CPU = torch.device("cpu")


class Counting(Loaded):
    """Counts its loads."""

    def __init__(self) -> None:
        self.loads = 0

        def load(checkpoint, every, device, options, processes):
            self.loads += 1
            return load_pipeline(checkpoint, every, device, options)

        super().__init__(Options(device="cpu"), CPU, load, processes=None)


@pytest.fixture(scope="module")
def checkpoint(random_nano) -> Checkpoint:
    return Checkpoint.open(random_nano)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """Two LoRA files, of which one is of some layers alone and has a whole tensor beside them."""
    folder, model = tmp_path_factory.mktemp("loras"), random_transformer("nano", torch.float32, CPU)
    every, some = weight_files.draw_factors(model), weight_files.draw_factors(model, rank=2, seed=5)
    some = {name: factors for name, factors in some.items() if "blocks.0" in name}
    first = weight_files.write_lora(folder / "a.safetensors", every)
    second = weight_files.write_lora(folder / "b.safetensors", some, "musubi")
    return [str(first), str(second)]


def settings(checkpoint: Checkpoint, **layer) -> Settings:
    return checkpoint.resolve({"prompt": "a cat", "video": {"size": "64*48", "frame_num": 5}} | layer)


def state(pipe) -> dict[str, torch.Tensor]:
    return pipe.transformer.state_dict()


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_another_lora_is_the_very_weights_of_a_fresh_load(checkpoint, files, dtype):
    loaded, (a, b) = Counting(), files
    wanted = [[a], [b, f"{a}:0.3"], [f"{b}:-0.5"], []]
    pipe = loaded.ready(checkpoint, settings(checkpoint, dtype=dtype))
    places = {name: tensor.data_ptr() for name, tensor in state(pipe).items()}
    for given in wanted:
        asked = settings(checkpoint, dtype=dtype, lora=given)
        assert loaded.ready(checkpoint, asked) is pipe and tuple(pipe.lora) == asked.lora
        assert_equal(state(pipe), state(load_pipeline(checkpoint, [asked], CPU, loaded.options)))
    # In place, so that compiled blocks go on with them.
    assert loaded.loads == 1 and places == {name: tensor.data_ptr() for name, tensor in state(pipe).items()}


def test_a_load_with_a_lora_can_lose_it(checkpoint, files):
    loaded = Counting()
    loaded.ready(checkpoint, settings(checkpoint, lora=files[:1]))
    pipe = loaded.ready(checkpoint, settings(checkpoint))
    assert loaded.loads == 1
    assert_equal(state(pipe), state(load_pipeline(checkpoint, [settings(checkpoint)], CPU, loaded.options)))


def test_blocks_that_wait_in_pieces_of_memory_get_another_lora_there(checkpoint, files):
    loaded = Counting()
    pipe = loaded.ready(checkpoint, settings(checkpoint))
    stream_blocks(pipe.transformer, list(pipe.transformer.blocks), CPU, kept=1)
    asked = settings(checkpoint, lora=files[:1])
    assert loaded.ready(checkpoint, asked) is pipe
    fresh = load_pipeline(checkpoint, [asked], CPU, loaded.options)
    with pipe.transformer.block_stream.opened():
        x, t, text = (
            torch.randn(1, 16, 2, 6, 8),
            torch.tensor([500.0]),
            torch.randn(1, 4, pipe.transformer.config.text_dim),
        )
        with torch.no_grad():
            assert torch.equal(pipe.transformer(x, t, text)[0], fresh.transformer(x, t, text)[0])


def test_a_file_that_is_another_under_its_name_is_merged(checkpoint, files, tmp_path):
    loaded, file = Counting(), tmp_path / "style.safetensors"
    asked = settings(checkpoint, lora=[str(file)])
    for source in files:
        other = tmp_path / "other"
        other.write_bytes(open(source, "rb").read())
        os.replace(other, file)
        pipe = loaded.ready(checkpoint, asked)
        assert_equal(state(pipe), state(load_pipeline(checkpoint, [asked], CPU, loaded.options)))
    assert loaded.loads == 1


def test_packed_weights_are_loaded_anew_for_a_lora_and_that_is_said(checkpoint, files, caplog):
    class Packed(torch.nn.Parameter):
        """Of another class, as the weights of float8 and of GGUF are."""

    loaded, asked = Counting(), settings(checkpoint, lora=files[:1])
    layer = loaded.ready(checkpoint, settings(checkpoint)).transformer.blocks[1].attn1.to_q
    layer.weight = Packed(layer.weight.data, requires_grad=False)
    caplog.set_level("INFO", "wan")
    pipe = loaded.ready(checkpoint, asked)
    assert loaded.loads == 2 and "lora: the weights are packed or shared out, so they are loaded anew" in caplog.text
    assert_equal(state(pipe), state(load_pipeline(checkpoint, [asked], CPU, loaded.options)))


def test_weights_of_neither_lora_are_not_left_behind(checkpoint, files, monkeypatch):
    loaded, asked = Counting(), settings(checkpoint, lora=files[:1])
    loaded.ready(checkpoint, settings(checkpoint))

    def runs_out(model, *_):
        next(model.parameters()).zero_()
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(lora, "merge_anew", runs_out)
        with pytest.raises(torch.OutOfMemoryError):
            loaded.ready(checkpoint, asked)
    pipe = loaded.ready(checkpoint, asked)
    assert loaded.loads == 2
    assert_equal(state(pipe), state(load_pipeline(checkpoint, [asked], CPU, loaded.options)))


def test_caches_come_and_go_and_videos_are_as_of_a_fresh_load(checkpoint):
    loaded = Counting()
    first = None
    for cache in ("none", "first_block:0.5", "none"):
        asked = settings(
            checkpoint, cache=cache, attention={"algorithm": "nabla-0.6"}, sampling={"steps": 5, "seed": 1}
        )
        pipe = loaded.ready(checkpoint, asked)
        fresh = load_pipeline(checkpoint, [asked], CPU, loaded.options)
        assert (pipe.cache is None) == (cache == "none")
        videos = [
            torch.from_numpy(one.generate("a cat", size=(64, 48), frame_num=5, steps=5, seed=1, guide_scale=2.0))
            for one in (pipe, fresh)
        ]
        assert torch.equal(*videos)
        first = videos[0] if first is None else first
    assert loaded.loads == 1 and torch.equal(first, videos[0])
