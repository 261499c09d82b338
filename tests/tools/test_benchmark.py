"""The benchmark runs on a CPU at small sizes and prints a table and one line of JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5AttnProcessor
from starting import Forked, finish, fork

import wan
from nabla import NablaConfig
from scripts import benchmark
from wan.config.cache_settings import KINDS
from wan.config.settings import VideoSettings
from wan.memory.planner import FRAGMENTS, MemoryBudget, choose
from wan.models.attention import apply_attention
from wan.models.wan.random_checkpoint import random_transformer
from wan.tools.benchmark import placing
from wan.tools.benchmark.models import MODELS
from wan.tools.benchmark.program import parse_args

SCRIPT = Path(benchmark.__file__)


@pytest.mark.parametrize(
    "mode, first",
    (
        ("mask", "64x48x5: lists, keep-0.1, gather"),
        ("attention", "64x48x5: dense, sdpa"),
        ("forward", "64x48x5: dense, sdpa"),
        ("pipeline", "64x48x5: decode, fast, float32"),
        ("training", "64x48x5: attention, dense, sdpa"),
        ("calibration", "64x48x5: a block, dense"),
    ),
)
def test_modes(mode, first, tmp_path):
    flags = [mode, "--quick", "--size", "64*48", "--frame_num", "5", "--device", "cpu"]
    flags += ["--model", "nano", "--dtype", "float32", "--layers", "1", "--mask_refresh", "2", "--batch", "2"]
    # In a process of its own: compiles are counted, and kernels that were tried would be chosen in other tests.
    code, out, said = finish(Forked(SCRIPT, *flags, cwd=tmp_path))
    assert code == 0, said
    *table, record = out.splitlines()
    record = json.loads(record)
    assert record["mode"] == mode and record["machine"]["torch"] == torch.__version__
    rows = record["rows"]
    assert len(rows) == len(table) and rows[0]["what"] == first
    assert all(row["low"] <= row["ms"] <= row["high"] for row in rows)
    if mode == "forward":
        assert [row["recompiles"] for row in rows] == [0] * 4 and rows[2]["speedup"] > 0
        assert rows[3]["what"] == "64x48x5, 2 at once: keep-0.1" and rows[3]["times_one_by_one"] > 0
    if mode == "training":
        assert rows[-1]["what"] == "64x48x5: nano, 1 layers, keep-0.1" and rows[-1]["backend"] == "reference"
        assert all(row["speedup"] > 0 for row in (rows[1], rows[-1]))
    if mode == "calibration":
        fast, exact = rows[-2:]
        assert 0 < fast["ms"] < exact["ms"] and fast["host_gib"] > 0
    if mode == "pipeline":
        assert rows[-1]["what"].endswith("masks kept for 2 steps") and rows[-1]["change_of_latents"] < 1


@pytest.mark.parametrize(
    "mode, first",
    (
        ("mask", "128x128x5: lists, keep-0.1, gather"),
        ("attention", "128x128x5: dense, sdpa"),
        ("forward", "128x128x5: dense, sdpa"),
        ("pipeline", "128x128x5: decode, fast, float32"),
        ("memory", "128x128x5: no limit, text"),
    ),
)
def test_kandinsky_s_modes(mode, first, tmp_path, monkeypatch):
    # That compiled blocks compute the same, and are compiled once, is tested with its transformer.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    flags = [mode, "--quick", "--model", "kandinsky5-nano", "--layers", "1", "--size", "128*128", "--frame_num", "5"]
    flags += ["--budget", "0.001"]
    code, out, said = finish(Forked(SCRIPT, *flags, "--device", "cpu", cwd=tmp_path))
    assert code == 0, said
    *table, record = out.splitlines()
    rows = json.loads(record)["rows"]
    assert rows[0]["what"] == first
    # Plans of memory have lines of their own.
    assert len(rows) == len(table) or mode == "memory"
    if mode == "memory":
        assert "transformer float32, on the GPU throughout" in table[0] and "do not fit" in table[-1]
        assert len(rows) == 3
    if mode == "forward":
        assert rows[1]["what"] == "128x128x5: keep-0.1" and rows[1]["speedup"] > 0


def test_kandinsky_s_baseline_is_diffusers_own_model():
    family, video = MODELS["kandinsky5-nano"], VideoSettings((128, 128), 5)
    transformer = family.random_transformer("kandinsky5-nano", torch.float32, torch.device("cpu"), layers=2)

    def processors() -> set[type]:
        return {type(part.processor) for part in transformer.modules() if hasattr(part, "processor")}

    plain, forward = processors(), family.forward(transformer, video)
    assert plain == {Kandinsky5AttnProcessor}
    with torch.no_grad():
        baseline = forward()
        family.as_ours(transformer)
        ours = family.forward(transformer, video)()
    # diffusers rounds queries and keys to bfloat16; texts are padded here and not there.
    assert 0 < (ours - baseline).norm() / baseline.norm() < 1e-2
    assert processors() != plain
    family.as_diffusers(transformer)
    with torch.no_grad():
        assert processors() == plain and torch.equal(family.forward(transformer, video)(), baseline)


NANO = [model for model in MODELS if "nano" in model and not model.startswith("kandinsky")]


@pytest.mark.parametrize("model", NANO)
@torch.no_grad()
def test_each_of_wan_s_models_runs_as_diffusers_has_it_and_as_ours(model):
    family, video = MODELS[model], VideoSettings((64, 64), 5, geometry=MODELS[model].geometry)
    transformer = family.random_transformer(model, torch.float32, torch.device("cpu"), layers=1)
    forward = family.forward(transformer, video)
    baseline = forward()
    family.as_ours(transformer)
    apply_attention(transformer, NablaConfig(keep=1.0))
    assert torch.allclose(forward(), baseline, atol=1e-4) and baseline.isfinite().all()
    latents, predict, conditions = family.sampled(transformer, video)
    assert baseline.shape == latents.shape == (1, family.models[model].latent_channels, *video.latents_size)
    assert predict(latents, torch.tensor([500]), conditions.prompt).shape == latents.shape
    assert len(family.all_blocks(transformer)) == (2 if "vace" in model else 1)
    if "picture" in model:
        # The first frame is clean, which the rest of it sees.
        plain = MODELS[model.removesuffix("-picture")].forward(transformer, video)
        assert not torch.equal(plain(), forward())
    assert family.decode(family.random_vae(model, torch.device("cpu")), latents).shape[2:] == (5, 64, 64)


def test_wan_s_models_are_measured_at_the_sizes_that_they_were_published_for():
    found = {model: parse_args(["forward", "--model", model]) for model in ("vace-1.3B", "ti2v-5B-picture")}
    assert [(args.size, args.frame_num) for args in found.values()] == [(["832*480"], [81]), (["1280*704"], [121])]


def test_experts_take_turns_within_a_budget(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    family, video, host = MODELS["i2v-A14B-nano"], VideoSettings((64, 64), 5), MemoryBudget(10**15, 10**15, 10**15)
    sizes, dtype = family.models["i2v-A14B-nano"], torch.float32
    models, workload = family.weigh_models(sizes, dtype), family.workload_for(sizes, video, dtype)
    resident = choose(*models, workload, host, can_quantize=False, **family.others_of(sizes)).peak
    # A little less than what all models take at once.
    budget = str((1 + FRAGMENTS) * resident / 1e9 - 1e-5)
    flags = ["memory", "--quick", "--model", "i2v-A14B-nano", "--size", "64*64", "--frame_num", "5", "--budget", budget]
    code, out, said = finish(Forked(SCRIPT, *flags, "--device", "cpu", cwd=tmp_path))
    assert code == 0, said
    *table, record = out.splitlines()
    found = {row["what"].removeprefix("64x64x5: "): row for row in json.loads(record)["rows"]}
    steps = ["expert 1", "expert 2", "the next expert as the one before finishes", "the next expert after it"]
    stages = ["text", "picture", *(f"sampling, {step}" for step in steps), "decoding"]
    assert [what.removeprefix("no limit, ") for what in list(found)[:7]] == stages and len(found) == 14
    assert "2 experts in float32, one at a time on the GPU while it samples" in table[8]
    assert found["no limit, sampling, expert 2"]["step_s"] > 0 and found["no limit, picture"]["frames"] == 5


@pytest.mark.parametrize("model", ("i2v-nano", "i2v-A14B-nano", "ti2v-5B-nano-picture"))
def test_a_whole_video_of_random_weights(model, monkeypatch, capsys):
    # That compiled blocks compute the same is tested with the pipelines.
    monkeypatch.setattr(placing, "compile_blocks", lambda blocks: None)
    flags = ["run", "--model", model, "--no_dense", "--keep", "0.5", "--repeats", "1", "--steps", "4", "--budget"]
    assert benchmark.main([*flags, "--size", "64*64", "--frame_num", "5", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    (row,) = json.loads(said.splitlines()[-1])["rows"]
    assert row["what"] == "64x64x5: no limit, 4 steps, keep-0.5"
    assert 1000 * (row["text_s"] + row["sampling_s"] + row["decode_s"]) == pytest.approx(row["ms"], rel=0.2)
    assert ("2 experts" in said) is ("A14B" in model) and "(text 0.0, picture 0.0, sampling" in said


def test_a_warm_server_beside_generate(monkeypatch, capsys):
    # That compiled blocks compute the same is tested with the pipelines; the second is for the server's own process.
    monkeypatch.setattr(placing, "compile_blocks", lambda blocks: None)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    flags = ["serve", "--no_dense", "--keep", "0.5", "--repeats", "1", "--steps", "2", "--model", "nano"]
    assert benchmark.main([*flags, "--size", "64*48", "--frame_num", "5", "--device", "cpu"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["what"].removeprefix("64x48x5, 2 steps, keep-0.5: ") for row in rows] == [
        "generate",
        "generate, and its file",
        "the server's text, sampling and decoding",
        "from a request to the first byte",
    ]
    assert rows[2]["overhead"].endswith("%") and 0 < rows[3]["beside_the_job_ms"] < rows[3]["ms"]


def test_a_mode_that_does_not_measure_a_model_is_one_line(capsys):
    assert benchmark.main(["training", "--model", "kandinsky5-lite", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert (
        said
        == "error: mode training does not measure kandinsky5-lite; use --model with one of nano, t2v-1.3B, t2v-14B\n"
    )


def test_kandinsky_is_measured_at_its_own_sizes():
    found = {model: parse_args(["forward", "--model", model]) for model in ("kandinsky5-lite", "kandinsky5-pro")}
    assert [(args.size, args.frame_num) for args in found.values()] == [(["768*512"], [241]), (["1280*768"], [121])]


def test_runs_within_budgets_beside_the_one_without(tmp_path, monkeypatch):
    flags = "memory --quick --size 64*48 --frame_num 5 --device cpu --model nano --dtype float32 --budget 1 0.001"
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    code, out, said = finish(Forked(SCRIPT, *flags.split(), cwd=tmp_path))
    assert code == 0, said
    *table, record = out.splitlines()
    rows = json.loads(record)["rows"]
    stages = ("text", "sampling", "decoding")
    names = [f"64x48x5: {limit}, {stage}" for limit in ("no limit", "1 GB") for stage in stages]
    assert [row["what"] for row in rows] == names and all(row["times_no_limit"] > 0 for row in rows)
    assert table[0].startswith("64x48x5: no limit: transformer float32, on the GPU throughout")
    assert table[-1].startswith("64x48x5: 0.001 GB: memory: 5 frames of 64*48 do not fit into 0.0 GB of the GPU")


def test_several_processes_against_one(tmp_path, monkeypatch, capsys):
    flags = "parallel --quick --size 64*48 --frame_num 5 --device cpu --layers 1 --steps 2".split()
    # A dozen compiles for each process: that compiled blocks of several processes are right is tested with the layouts.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    code, out, said = finish(fork(2, SCRIPT, *flags, cwd=tmp_path))
    assert code == 0, said
    rows = json.loads(out.splitlines()[-1])["rows"]
    found = {row["what"].removeprefix("64x48x5: "): row for row in rows}
    assert found["2 guided steps, keep-0.1, one GPU and ulysses"]["psnr"] > 100
    assert all(found[f"forward, uneven heads, dealt {how}"]["speedup"] > 0 for how in ("in turn", "by what they kept"))
    assert benchmark.main(flags) == 2 and "start it with torchrun" in capsys.readouterr().err


def test_step_caches_on_random_weights_and_on_a_checkpoint(random_nano, tmp_path, monkeypatch, capsys):
    flags = "cache --quick --size 64*48 --frame_num 5 --device cpu".split()
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    code, out, said = finish(Forked(SCRIPT, *flags, "--no_dense", cwd=tmp_path))
    assert code == 0, said
    rows = json.loads(out.splitlines()[-1])["rows"]
    name = "64x48x5: a step, keep-0.1"
    ends = ["", *(f", {kind}, {what}" for kind in KINDS for what in ("nothing reused", "reused"))]
    assert [row["what"] for row in rows] == [name + end for end in ends]
    assert [row["reused"] for row in rows[1:]] == ["0 of 6", "4 of 6"] * 2 + ["0 of 6", "2 of 6"]
    flags += ["--ckpt_dir", str(random_nano), "--steps", "5", "--count", "2", "--sparse_algo", "keep-0.5"]
    assert benchmark.main([*flags, "--cache", "first_block:0", "mag:0", "mag:1e9", "taylorseer:2"]) == 0
    plain, *exact, loose, predicted = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert plain["what"] == "64x48x5: 5 steps, keep-0.5" and loose["what"].endswith(", mag:1e+09")
    assert [row["psnr"] for row in exact] == [100, 100] and loose["psnr"] < 100 and loose["speedup"] > 0
    # The first step warms up, three are reused, and one is computed.
    assert [row["reused"] for row in (*exact, loose)] == ["0 of 10", "0 of 10", "6 of 10"]
    # Every second one of the four.
    assert predicted["what"].endswith(", taylorseer:2") and predicted["reused"] == "4 of 10" and predicted["psnr"] < 100
    ratios = tmp_path / "ratios.json"
    ratios.write_text(json.dumps({"ratios": [1.0, 1.0], "measured_on": {"steps": 7, "attention": "keep-0.5"}}))
    assert benchmark.main([*flags, "--cache", f"mag:0.1:{ratios}"]) == 0
    assert "measured with steps 7, and this runs with steps 5" in capsys.readouterr().err
    assert benchmark.main([*flags, "--cache", "taylorseer:1"]) == 2
    assert "interval 1 is not a whole number" in capsys.readouterr().err
    assert benchmark.main([*flags, "--cache", "mag:much"]) == 2 and "'much' is not a number" in capsys.readouterr().err
    assert benchmark.main([*flags, "--cache", "none"]) == 2 and "the first row is without" in capsys.readouterr().err


def test_float8_needs_a_gpu(capsys):
    flags = ["forward", "--fp8", "--device", "cpu", "--dtype", "float32"]
    assert benchmark.main(flags) == 2 and "error: fp8 does not work on cpu" in capsys.readouterr().err


def test_bad_sizes_are_one_line(tmp_path):
    code, _, said = finish(Forked(SCRIPT, "mask", "--size", "3*3", cwd=tmp_path))
    assert code == 2 and said.startswith("error: size 3*3") and said.count("\n") == 1


def test_random_transformer_is_the_checkpoint_s_model(random_nano):
    made = random_transformer("nano", torch.bfloat16, torch.device("cpu"))
    loaded = wan.WanT2V.from_pretrained(random_nano, dtype=torch.bfloat16).transformer
    kinds = [{name: (t.shape, t.dtype) for name, t in model.state_dict().items()} for model in (made, loaded)]
    assert kinds[0] == kinds[1]
