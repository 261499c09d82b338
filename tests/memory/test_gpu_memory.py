"""On a CUDA GPU: streamed blocks and plans of memory give what the plain model gives, under an enforced limit."""

from __future__ import annotations

from dataclasses import replace

import imageio.v3 as iio
import pytest
import torch
import weight_files
from safetensors.torch import load_file, save_file

import generate
import wan
from nabla import NablaConfig
from wan.attention.compile import compile_blocks
from wan.config.settings import VideoSettings
from wan.memory.budget import CONTEXT, budget_of, limit
from wan.memory.estimates import decode_bytes, forward_bytes
from wan.memory.placement import experts_on_device, free_bytes, on_device
from wan.memory.planner import GB, MemoryBudget, MemoryPlan
from wan.memory.streaming import stream_blocks
from wan.memory.weigh import weigh
from wan.models.attention import apply_attention
from wan.models.wan.fused_gelu import fuse_gelu
from wan.models.wan.latents import decode
from wan.models.wan.random_checkpoint import MODELS, random_transformer, random_vae
from wan.models.wan.random_sizes import workload_for
from wan.models.wan.vae import speed_up_decoder
from wan.quantize.quantizer import make_quantizer
from wan.tools.benchmark.wan_models import wan_inputs

pytestmark = pytest.mark.gpu

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PLAN = MemoryPlan(None, None, True, 0, 2, "stream", 1, True, {"sampling": 0}, 0, 1.0)
SMALL = VideoSettings((832, 480), 81)
LAYERS = 10
WORK = workload_for(MODELS["t2v-14B"], SMALL, torch.bfloat16)


@pytest.fixture(autouse=True)
def no_limit_afterwards():
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("kept", (0, 3, LAYERS))
@pytest.mark.parametrize("compiled", (False, True))
def test_streamed_blocks_give_the_same_to_the_bit_and_two_are_there(kept, compiled):
    transformer = random_transformer("t2v-1.3B", torch.bfloat16, GPU, layers=LAYERS)
    fuse_gelu(transformer)
    apply_attention(transformer, NablaConfig(keep=0.3))
    inputs = wan_inputs(transformer, VideoSettings((256, 208), 9), 1)
    if compiled:
        compile_blocks(transformer.blocks)
    with torch.no_grad():
        plain = transformer(*inputs, return_dict=False)[0]
        weights = weigh(transformer, transformer.blocks, torch.bfloat16, transformer._keep_in_fp32_modules)
        stream_blocks(transformer, transformer.blocks, GPU, kept)
        torch.cuda.empty_cache()
        left = torch.cuda.memory_allocated()
        with on_device(transformer, GPU, offload=True):
            assert torch.cuda.memory_allocated() - left < 1.02 * weights.streamed(None, kept) + 2**22
            with torch._dynamo.config.patch(error_on_recompile=True):
                for _ in range(3):
                    assert torch.equal(transformer(*inputs, return_dict=False)[0], plain)
        assert torch.cuda.memory_allocated() - left < 2**22
        assert transformer.blocks[1].ffn.net[2].weight.is_pinned()


@pytest.mark.parametrize("kept", (0, 3, LAYERS))
def test_experts_take_turns_to_the_bit_in_the_memory_of_one(kept):
    pair = [random_transformer("t2v-1.3B", torch.bfloat16, GPU, seed, layers=LAYERS) for seed in (0, 1)]
    inputs = wan_inputs(pair[0], VideoSettings((256, 208), 9), 1)

    def walk(offload: bool) -> list[torch.Tensor]:
        results = []
        with experts_on_device(pair, GPU, offload) as experts:
            for step, number in enumerate((0, 0, 1, 1)):
                model = experts.turn_to(number)
                if step == 1:
                    experts.prepare(1, forwards=2)
                results += [model(*inputs, return_dict=False)[0] for _ in range(2)]
        return results

    with torch.no_grad():
        plain = walk(offload=False)
        for model in pair:
            fuse_gelu(model)
        fused = walk(offload=False)
        weights = weigh(pair[0], pair[0].blocks, torch.bfloat16, pair[0]._keep_in_fp32_modules)
        for model in pair:
            stream_blocks(model, model.blocks, GPU, kept)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        left = torch.cuda.memory_allocated()
        for _ in range(2):
            assert all(map(torch.equal, walk(offload=True), fused))
        assert torch.cuda.memory_allocated() - left < 2**22
        # Of one expert, what is being read of the rest of the next, and what forwards of 1,040 tokens take.
        assert torch.cuda.max_memory_allocated() - left < weights.streamed(None, kept) + weights.rest + 2**28
    assert all((a - b).norm() < 0.05 * a.norm() for a, b in zip(plain, fused))


@pytest.mark.parametrize("packing", (None, "int8", "int4", "fp8"))
def test_a_forward_keeps_to_its_estimate_under_a_limit(packing):
    """Ten layers of the 14B at 832x480, 81 frames, which do not fit as a whole: compiling included."""
    if packing is not None:
        pytest.importorskip("torchao")
    if packing == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs a GPU of compute capability 8.9")
    made = {}

    def place(model):
        quantizer = made["quantizer"] = make_quantizer(model, model.blocks, packing, GPU, CPU)

        def one(name, tensor):
            packed = tensor if quantizer is None else quantizer(name, tensor)
            return tensor.cpu() if packed is tensor else packed

        return one

    transformer = random_transformer("t2v-14B", torch.bfloat16, GPU, layers=LAYERS, place=place)
    weights = weigh(transformer, transformer.blocks, torch.bfloat16, transformer._keep_in_fp32_modules)
    fuse_gelu(transformer)
    compile_blocks(transformer.blocks)
    stream = stream_blocks(transformer, transformer.blocks, GPU)
    assert packing is None or made["quantizer"].left == 0
    apply_attention(transformer, NablaConfig(keep=0.2))
    limit(GPU, MemoryBudget(int(6 * GB), 0, 0))
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad(), stream.opened():
        inputs = wan_inputs(transformer, SMALL, 1)
        first = transformer(*inputs, return_dict=False)[0]
        again = transformer(*inputs, return_dict=False)[0]
    assert first.isfinite().all() and torch.equal(first, again)
    expected = weights.rest + 2 * max(stream.sizes) + forward_bytes(WORK)
    expected += {"int8": 4, "int4": 16}.get(packing, 0) * weights.largest
    assert torch.cuda.max_memory_allocated() < 1.05 * expected


@pytest.mark.parametrize("budget", (24, 6.5, 4))
def test_a_decode_keeps_to_its_limit_in_as_many_columns_as_it_takes(budget):
    vae = random_vae("t2v-14B", GPU)
    speed_up_decoder(vae, torch.float16)
    latents = torch.randn(1, 16, *SMALL.latents_size, device=GPU)
    limit(GPU, MemoryBudget(int(budget * GB), 0, 0))
    torch.cuda.reset_peak_memory_stats()
    video = decode(vae, latents)
    assert video.shape[2:] == (81, 480, 832) and video.isfinite().all()
    assert torch.cuda.max_memory_allocated() < budget * GB
    assert vae.use_tiling is (budget * GB < decode_bytes(WORK.decoding))


def test_free_memory_is_that_under_the_limit():
    limit(GPU, MemoryBudget(int(2 * GB), 0, 0))
    assert 0 < free_bytes(GPU) <= 2 * GB
    assert budget_of(GPU, 1.5).gpu <= 1.5 * GB - CONTEXT and budget_of(GPU, "auto").gpu <= 2 * GB


@pytest.mark.parametrize("packing", (None, "int8", "int4", "fp8"))
@pytest.mark.parametrize("in_turns", (False, True))
def test_a_planned_pipeline_follows_the_plain_one(random_nano, packing, in_turns):
    if packing is not None:
        pytest.importorskip("torchao")
    if packing == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs a GPU of compute capability 8.9")
    auto, settings = NablaConfig(threshold=0.5), dict(size=(256, 208), frame_num=9, seed=1, steps=2)
    plain = wan.WanT2V.from_pretrained(random_nano, auto, "cuda", torch.bfloat16).generate("a cat", **settings)
    for text, text_packing in (("stream", None), ("gpu", "int8"), ("gpu", None), ("cpu", None)):
        if (text == "stream" and not in_turns) or (text_packing and packing is None):
            continue
        plan = replace(PLAN, quantization=packing, text_quantization=text_packing, in_turns=in_turns, text=text)
        pipe = wan.WanT2V.from_pretrained(random_nano, auto, "cuda", torch.bfloat16, plan=plan)
        for _ in range(2):
            video = pipe.generate("a cat", **settings).astype(float)
        assert abs(video - plain).mean() < (40 if packing == "int4" else 12)


def test_generate_plans_says_so_and_limits_itself(random_nano, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--prompt", "a cat", "--ckpt_dir", str(random_nano), "--size", "256*208", "--frame_num", "9"]
    flags += ["--sample_steps", "2", "--save_file", "out.mp4"]
    for memory in ("auto", "4"):
        assert generate.main([*flags, "--memory", memory]) == 0
        said = capsys.readouterr().err
        assert "memory: transformer bfloat16" in said and "expected peak" in said and "peak memory: host" in said
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert generate.main([*flags, "--memory", "0.71"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        said.startswith("error: memory: 9 frames of 256*208 do not fit into 0.0 GB of the GPU") and "would do" in said
    )


def test_a_gguf_file_under_a_budget_follows_its_weights_unpacked(random_nano, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    state = load_file(next(random_nano.glob("*.safetensors")))
    save_file(weight_files.write_gguf(tmp_path / "packed.gguf", state), tmp_path / "exact.safetensors")
    flags = ["--prompt", "a cat", "--ckpt_dir", str(random_nano), "--size", "256*208", "--frame_num", "9"]
    flags += ["--sample_steps", "2", "--memory", "4", "--base_seed", "1"]
    for name in ("packed.gguf", "exact.safetensors"):
        files = ["--transformer", str(tmp_path / name), "--save_file", f"{name}.mp4"]
        assert generate.main([*flags, *files]) == 0
        said = capsys.readouterr().err
        assert "memory: transformer " in said and "peak memory: host" in said
        torch.cuda.set_per_process_memory_fraction(1.0)
    packed, exact = (iio.imread(f"{name}.mp4").astype(float) for name in ("packed.gguf", "exact.safetensors"))
    assert abs(packed - exact).mean() < 12
