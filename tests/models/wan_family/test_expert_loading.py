"""Two experts from a checkpoint to a pipeline: files in place of either, LoRA in either or both, and how they lie."""

from __future__ import annotations

import pytest
import torch
import weight_files
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter
from wan_family_sets import checkpoint, expected, settings

import wan
from nabla import InputError, NablaConfig
from wan.caches.applied import reuse_of
from wan.memory.load_plan import ComponentBytes
from wan.memory.planner import MemoryPlan
from wan.models.checkpoint import Checkpoint
from wan.models.wan import loading
from wan.models.wan.memory import weigh_run

TASK = "wan22_t2v"
SPARSE = NablaConfig(threshold=0.7)
PLAN = MemoryPlan(None, None, True, 0, 2, "stream", 1, False, {"sampling": 0}, 0, 1.0, experts=2)


def sample(pipe, **changes) -> torch.Tensor:
    found = expected(TASK)
    texts = found["dit.context"][None], found["dit.negative"][None]
    return pipe.sample(*texts, **dict(noise=found["loop.noise"], steps=3, shift=12.0) | changes)


def load(**options):
    return wan.from_pretrained(checkpoint(TASK), SPARSE, **options)


@pytest.fixture(scope="module")
def pipe():
    return load()


def published(expert: str) -> dict[str, torch.Tensor]:
    folder = checkpoint(TASK) / f"{expert}_noise_model"
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def equal(first, second) -> bool:
    others = second.state_dict()
    return all(torch.equal(tensor, others[name]) for name, tensor in first.state_dict().items())


@pytest.mark.parametrize("number, expert, other", ((0, "high", "low"), (1, "low", "high")))
def test_a_file_takes_the_place_of_the_expert_that_it_is_given_for(pipe, tmp_path, number, expert, other):
    file = tmp_path / "a.safetensors"
    save_file(published(other), file)
    for given in ({expert: str(file)}, f"{expert}:{file}"):
        made = load(transformer=given)
        # Now they are alike, since the file is the other's.
        assert equal(made.transformer, made.transformer_2)
        assert equal(made.transformers[1 - number], pipe.transformers[1 - number])


@pytest.mark.parametrize("prefix, changes", (("high:", (True, False)), ("low:", (False, True)), ("", (True, True))))
def test_a_lora_goes_into_its_expert_and_one_of_none_into_both(pipe, tmp_path, caplog, prefix, changes):
    file = weight_files.write_lora(tmp_path / "a.safetensors", weight_files.draw_factors(pipe.transformer))
    caplog.set_level("INFO", "wan")
    made = load(lora=[f"{prefix}{file}:0.5"])
    assert tuple(not equal(one, plain) for one, plain in zip(made.transformers, pipe.transformers)) == changes
    said = tuple(f"merged into the weights of the {expert}-noise expert" in caplog.text for expert in ("high", "low"))
    assert said == changes
    if not prefix:
        for one, plain in zip(made.transformers, pipe.transformers):
            down, up = weight_files.draw_factors(plain)["blocks.0.attn1.to_q"]
            layer, before = one.blocks[0].attn1.to_q, plain.blocks[0].attn1.to_q
            torch.testing.assert_close(layer.weight, before.weight + 0.5 * up @ down)


def test_either_expert_may_be_a_packed_file_with_its_lora_beside(pipe, tmp_path):
    pytest.importorskip("gguf")
    # Rows of 48 numbers are no whole blocks of what packs more.
    exact = weight_files.write_gguf(tmp_path / "low.gguf", published("low"), "BF16")
    save_file(exact, tmp_path / "low.safetensors")
    lora = [f"low:{weight_files.write_lora(tmp_path / 'a.safetensors', weight_files.draw_factors(pipe.transformer))}"]
    packed = load(transformer={"low": str(tmp_path / "low.gguf")}, lora=lora)
    unpacked = load(transformer={"low": str(tmp_path / "low.safetensors")}, lora=lora)
    torch.testing.assert_close(sample(packed), sample(unpacked), atol=1e-3, rtol=0)
    settings = Checkpoint.open(checkpoint(TASK)).resolve(
        {"transformer": {"low": str(tmp_path / "low.gguf")}}, needs_prompt=False
    )
    with pytest.raises(InputError, match="experts stored alike; give GGUF files of both, or of none"):
        weigh_run(Checkpoint.open(checkpoint(TASK)), [settings])


def test_a_file_that_does_not_say_which_expert_it_is_is_refused(tmp_path):
    save_file(published("low"), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="could stand in for either expert .*, high or low noise; write high:FILE or"):
        load(transformer=tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="transformer has an unknown key 'middle'"):
        load(transformer={"middle": str(tmp_path / "a.safetensors")})


@pytest.mark.parametrize(
    "layer, message",
    (
        ({"sampling": {"guide_scale": [3.0, 4.0]}}, "guide_scale 3,4 is for a checkpoint of two experts"),
        ({"transformer": "high:/a.safetensors"}, "transformer high:... is for a checkpoint of two experts"),
        ({"lora": ["low:/a.safetensors:1.0"]}, "lora low:... is for a checkpoint of two experts"),
    ),
)
def test_pairs_are_refused_where_there_is_one_transformer(nano, layer, message):
    with pytest.raises(InputError, match=message) as error:
        Checkpoint.open(nano).resolve(layer, needs_prompt=False)
    assert "\n" not in str(error.value)


def test_both_count_where_it_is_decided_whether_idle_models_move_out(monkeypatch):
    seen = []

    def note(options, fp8, sizes: ComponentBytes):
        seen.append(sizes)
        return original(options, fp8, sizes)

    original = loading.make_load_plan
    monkeypatch.setattr(loading, "make_load_plan", note)
    made = load()
    weights = [sum(x.numel() * x.element_size() for x in one.parameters()) for one in made.transformers]
    assert weights[0] == weights[1] > 0 and seen[0].transformer == sum(weights)


def test_streamed_and_packed_experts_sample_as_whole_ones(pipe, caplog):
    exact = sample(pipe)
    weighed = weigh_run(
        Checkpoint.open(checkpoint(TASK)), [Checkpoint.open(checkpoint(TASK)).resolve({}, needs_prompt=False)]
    )
    assert weighed.experts == 2 and weighed.picture == 0
    made = load(plan=PLAN)
    assert all(hasattr(one, "block_stream") for one in made.transformers) and made.offload
    for _ in range(2):
        assert torch.equal(sample(made), exact)
    assert not any(one.block_stream.whole or one.block_stream.buffers for one in made.transformers)
    whole = load(offload=True)
    assert torch.equal(sample(whole), exact)


def test_both_are_quantised(pipe, caplog):
    pytest.importorskip("torchao")
    caplog.set_level("INFO", "wan")
    plan = MemoryPlan("int8", None, True, 0, 2, "gpu", 1, False, {"sampling": 0}, 0, 1.0, experts=2)
    made = load(dtype=torch.bfloat16, plan=plan)
    assert all(f"{expert}-noise expert: 20 linear layers in int8" in caplog.text for expert in ("high", "low"))
    latents, exact = sample(made), sample(load(dtype=torch.bfloat16))
    assert ((latents - exact).norm() / exact.norm()) < 0.2


def test_the_graph_of_the_first_expert_s_blocks_serves_the_second(pipe, monkeypatch):
    exact, counter, compiler = sample(pipe), CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiler(f, backend=counter, fullgraph=True, dynamic=False))
    made = load(compile=True)
    assert torch.equal(sample(made), exact) and counter.frame_count == 1


def test_a_cache_is_put_on_both(pipe):
    made = load(cache="first_block:1e6")
    assert sample(made, steps=6).isfinite().all()
    # Of steps 4 and 5 that are the second expert's, one is reused in either branch.
    forwards, reused = reuse_of(made.transformers)
    assert forwards == 12 and made.transformer_2.step_cache.reused == 2 < reused


def test_a_checkpoint_names_its_guidance():
    found = Checkpoint.open(checkpoint(TASK)).own_sampling()
    assert list(found.guide_scale) == settings(TASK)["guide_scale"]
