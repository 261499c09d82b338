"""Settings compared on whole videos: made once, gone on with, measured and told; scripts/evaluate.py."""

from __future__ import annotations

import importlib.machinery
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from places import ROOT
from safetensors.torch import load_file, save_file
from starting import finish, fork

import wan
from nabla import InputError, NablaConfig
from scripts import evaluate as script
from wan.config.model_settings import ModelSettings
from wan.config.settings import Settings
from wan.files.source_video import SourceVideo
from wan.files.video import write_lossless
from wan.run import generation
from wan.tools import quality
from wan.tools.evaluate import likeness, making
from wan.tools.evaluate.bootstrap import by_prompt, estimate
from wan.tools.evaluate.clip_score import load_clip
from wan.tools.evaluate.compared import DENSE, Compared, held_against, read_compared, stands_alone
from wan.tools.evaluate.evaluation import Plan, evaluate
from wan.tools.evaluate.folder import Folder
from wan.tools.evaluate.jobs import PROMPT_FOLDER, PROMPTS, STRIDE, jobs_of, shown
from wan.tools.evaluate.making import Progress
from wan.tools.evaluate.vbench import names_of

CPU = torch.device("cpu")
QUICK = "--size 64*64 --frame_num 5 --sample_steps 1 --sample_guide_scale 1 --device cpu".split()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def settings_of(prompt: str, seed: int | None = None) -> Settings:
    made = Settings(ModelSettings("somewhere"), prompt)
    return replace(made, sampling=replace(made.sampling, seed=seed))


@pytest.fixture
def prompts(tmp_path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a red ball\n" + json.dumps({"prompt": 'she says "a/b"', "seed": 7}) + "\n")
    return file


@pytest.fixture
def run(random_nano, tmp_path, prompts, monkeypatch):
    """scripts/evaluate.py: `run(*flags)` -> its exit code, with everything in `tmp_path / "out"`."""

    def run(*flags: object, ckpt: Path = random_nano) -> int:
        given = ["--ckpt_dir", ckpt, "--prompt_file", prompts, "--out", tmp_path / "out", *QUICK, *flags]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, given)])
        return script.main()

    return run


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """The attentions of videos that are made from here on."""
    found, original = [], making.make_frames

    def make_frames(pipe, settings, *args):
        found.append(settings.attention.algorithm)
        return original(pipe, settings, *args)

    monkeypatch.setattr(making, "make_frames", make_frames)
    return found


@pytest.fixture
def lpips(monkeypatch) -> ModuleType:
    """A package of that name, whose distance is a mean absolute difference."""

    class LPIPS(torch.nn.Module):
        def __init__(self, net: str, verbose: bool):
            super().__init__()
            assert net == "alex"

        def forward(self, one, two):
            assert one.shape[1] == 3 and -1 <= one.min() and one.max() <= 1
            return (one - two).abs().mean((1, 2, 3), keepdim=True)

    package = ModuleType("lpips")
    package.LPIPS, package.__spec__ = LPIPS, importlib.machinery.ModuleSpec("lpips", None)
    monkeypatch.setitem(sys.modules, "lpips", package)
    return package


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """A tiny CLIP with random weights, as transformers saves one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    words = {word: number for number, word in enumerate(["<end>", "a", "red", "ball", "she", "says"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<end>").save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 6, "max_position_embeddings": 8, "eos_token_id": 0, "bos_token_id": 0}
    vision = sizes | {"image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def frames_of(path: Path) -> np.ndarray:
    source = SourceVideo.open(path)
    return np.stack(list(source.take(range(source.count))))


def test_settings_are_made_measured_and_told(run, random_nano, tmp_path, lpips, clip, capsys):
    yaml = tmp_path / "cached.yaml"
    yaml.write_text(
        "checkpoint: another\nattention: {algorithm: keep-0.4, dense_layers: [0]}\ncache: first_block:0.1\n"
    )
    assert run("--settings", "nabla-0.4", yaml, "--seeds", "2", "--clip", clip, "--shown", "1") == 0
    out = tmp_path / "out"
    results, printed = json.loads((out / "results.json").read_text()), capsys.readouterr().out
    assert printed.startswith((out / "table.md").read_text())
    assert json.loads(printed.splitlines()[-1]) == {key: results[key] for key in results if key != "videos"}
    check_schema(results)
    dense, keep, cached = results["settings"]
    assert [one["videos"] for one in results["settings"]] == [4, 4, 4] and results["missing"] == {}
    assert dense["kept"]["mean"] == 1 > keep["kept"]["mean"] and dense["psnr"] is dense["lpips"] is None
    assert cached["attention"]["dense_layers"] == [0] and cached["cache"]["kind"] == "first_block"
    # Of four videos each setting's first compiles; two prompts are two independent values.
    assert dense["seconds"]["count"] == keep["psnr"]["count"] == 2
    assert results["against"] == "nabla-0.4" and [one["name"] for one in results["differences"]] == ["dense", "cached"]
    check_videos(results, out, random_nano)
    check_pictures(out)
    assert "cached is keep-0.4, dense_layers 0, cache first_block.\n" in printed


def check_schema(results: dict) -> None:
    measures = {"kept", "seconds", "psnr", "ssim", "lpips", "clip"}
    assert results.keys() == {"version", "made_on", "prompts", "seeds", "interval", "measures", "how", "missing"} | {
        "against",
        "settings",
        "differences",
        "videos",
    }
    assert results["version"] == 1 and results["measures"].keys() == measures
    for one in results["settings"]:
        assert one.keys() == {"name", "attention", "cache", "videos", "speedup"} | measures
    for one in results["differences"]:
        assert one.keys() == {"name", "against"} | measures
    for one in results["videos"]:
        assert one.keys() == {"setting", "name", "prompt", "seed", "file"} | measures
    found = [one[name] for one in results["settings"] for name in measures if one[name] is not None]
    assert found and all(one.keys() == {"mean", "low", "high", "count"} for one in found)


def check_videos(results: dict, out: Path, checkpoint: Path) -> None:
    """What is told of videos is what their own frames measure, and these are what the pipeline gives."""
    seeds = {(one["prompt"], one["seed"]) for one in results["videos"]}
    quoted = 'she says "a/b"'
    assert seeds == {("a red ball", 0), ("a red ball", STRIDE), (quoted, 7), (quoted, 7 + STRIDE)}
    pipe = wan.WanT2V.from_pretrained(checkpoint, NablaConfig.parse("nabla-0.4"))
    small = {"size": (64, 64), "frame_num": 5, "steps": 1, "guide_scale": 1}
    own = next(one for one in results["videos"] if one["setting"] == "nabla-0.4" and one["seed"] == 7)
    sparse, dense = (
        frames_of((out / own["file"].replace("videos", "frames").replace("nabla-0.4", name)).with_suffix(".mkv"))
        for name in ("nabla-0.4", "dense")
    )
    assert np.array_equal(sparse, pipe.generate(quoted, seed=7, **small))
    pair = torch.from_numpy(sparse), torch.from_numpy(dense)
    assert own["psnr"] == pytest.approx(quality.psnr(*pair)) and own["ssim"] == pytest.approx(quality.ssim(*pair))
    difference = np.abs(sparse.astype(float) - dense).mean() / 127.5
    assert own["lpips"] == pytest.approx(difference, rel=1e-4) and 0 <= own["clip"] <= 100
    record = json.loads((out / own["file"]).with_suffix(".json").read_text())
    assert record["settings"]["attention"]["algorithm"] == "nabla-0.4" and record["evaluation"]["kept"] == own["kept"]


def check_pictures(out: Path) -> None:
    # A line of text and three settings, whose names are as wide as they are; first, middle and last frame of 64x64.
    sheet = iio.imread(out / "sheet.png")
    assert sheet.shape[0] == 20 + 3 * 144 and sheet.shape[1] > 3 * 144
    (beside,) = (out / "beside").iterdir()
    assert iio.imread(beside, index=None).shape == (5, 64 + 20, 3 * 64, 3)
    # Nothing but videos, by names that give the prompt where a prompt can be a name.
    names = {"a red ball-0.mp4", "a red ball-1.mp4", "001-she-says-a-b-0.mp4", "001-she-says-a-b-1.mp4"}
    for setting in ("dense", "nabla-0.4", "cached"):
        assert {file.name for file in (out / "vbench" / setting).iterdir()} == names
        said = json.loads((out / "vbench" / f"{setting}.json").read_text())
        assert said.keys() == names and said["001-she-says-a-b-1.mp4"] == 'she says "a/b"'


def test_a_run_that_was_cut_goes_on_and_makes_nothing_twice(run, made, tmp_path, monkeypatch, capsys):
    original = making.make_frames

    def cut(*args):
        if len(made) == 3:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(making, "make_frames", cut)
        assert run("--settings", "nabla-0.4") == 130
    assert "the same command goes on" in capsys.readouterr().err
    out = tmp_path / "out"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    assert len(before) == 3 and not (out / "results.json").exists() and not list(out.rglob(".partial*"))
    assert run("--settings", "nabla-0.4") == 0 and made == ["dense", "dense", "nabla-0.4", "nabla-0.4"]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    first = json.loads((out / "results.json").read_text())
    # Each setting's first video of either run compiles; one that was made by the run that went on is its first.
    assert first["settings"][0]["seconds"]["count"] == 1 and first["settings"][1]["seconds"] is None
    assert run("--settings", "nabla-0.4") == 0 and len(made) == 4
    assert json.loads((out / "results.json").read_text()) == first


def test_a_killed_video_is_made_again_and_measured_again(run, made, tmp_path):
    assert run("--settings", "nabla-0.4") == 0
    out = tmp_path / "out"
    dense, sparse = (sorted((out / "videos" / name).glob("*.mp4"))[0] for name in ("dense", "nabla-0.4"))
    sparse.write_bytes(b"cut")
    measured = out / "measures" / "nabla-0.4" / f"{sparse.stem}.json"
    before = json.loads(measured.read_text())
    made.clear()
    assert run("--settings", "nabla-0.4") == 0
    assert made == ["nabla-0.4"] and json.loads(measured.read_text()) == before
    # Frames may go once they are measured, and are made anew where they are to be measured against.
    for frames in (out / "frames").rglob("*.mkv"):
        frames.unlink()
    made.clear()
    assert run("--settings", "nabla-0.4") == 0 and made == []
    assert run("--settings", "nabla-0.4", "nabla-0.3") == 0 and made == ["dense"] * 2 + ["nabla-0.3"] * 2
    assert dense.exists()


def test_settings_prompts_and_seeds_are_added(run, made, prompts, tmp_path):
    assert run("--settings", "nabla-0.4", "--prompts", "1") == 0 and made == ["dense", "nabla-0.4"]
    made.clear()
    assert run("--settings", "nabla-0.5", "nabla-0.4", "--prompts", "1", "--seeds", "2") == 0
    assert sorted(made) == ["dense", "nabla-0.4", "nabla-0.5", "nabla-0.5"]
    made.clear()
    assert run("--settings", "nabla-0.5") == 0 and sorted(made) == ["dense", "nabla-0.5"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [one["name"] for one in results["settings"]] == ["dense", "nabla-0.5"] and results["prompts"] == 2


OTHERS = {
    "--sample_steps 2": "was made with videos 000-0 sampling steps 1, and this run has 2",
    "--size 64*80": "was made with videos 000-0 video size",
    "--prompt_file other.txt": 'prompt "a red ball", and this run has "a blue ball"',
    "--dtype bfloat16": 'was made with model dtype "float32", and this run has "bfloat16"',
    "--ckpt_dir other": "was made with made_on weights",
    "--settings other/keep.yaml": 'was made with settings keep attention algorithm "nabla-0.4"',
    "--only_measure --out empty": "has no videos to measure",
    "--out other": "has files that are none of an evaluation",
}


def test_a_folder_of_something_else_is_refused_in_a_line(run, random_nano, made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for folder, keep in ((tmp_path, 0.4), (other, 0.5)):
        (folder / "keep.yaml").write_text(f"attention: {{algorithm: nabla-{keep}}}")
    (tmp_path / "other.txt").write_text("a blue ball")
    for file in random_nano.iterdir():
        (other / file.name).symlink_to(file)
    weights = other / "diffusion_pytorch_model.safetensors"
    changed = {name: value + 1 for name, value in load_file(weights).items()}
    weights.unlink()
    save_file(changed, weights)
    assert run("--settings", "keep.yaml", "--prompts", "1") == 0
    out, count = tmp_path / "out", len(made)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for change, said in OTHERS.items():
        capsys.readouterr()
        assert run("--settings", "keep.yaml", "--prompts", "1", *change.split()) == 2, change
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and said in errors[0] and len(made) == count
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert not list((tmp_path / "empty").glob("[!.]*"))


@pytest.mark.parametrize(
    "flags, said",
    (
        ("", "nothing is compared with dense attention; give --settings"),
        ("--settings dense", "nothing is compared"),
        ("--settings nabla-0.4 --against nabla-0.7", "against nabla-0.7 is none of the settings dense, nabla-0.4"),
        (
            "--settings nabla-0.4 --sparse_algo nabla-0.4",
            "--sparse_algo is not for comparing settings; give --settings",
        ),
        ("--settings nabla-0.4 --prompt x", "--prompt is not for comparing settings; give --prompt_file"),
        ("--settings nabla-0.4 --cache taylorseer:2", "--cache is not for comparing settings"),
        ("--settings nabla-0.4 --seeds 0", "'0' is not a positive whole number"),
        ("--settings nabla-0.4 --prompt_file none.txt", "prompt_file none.txt cannot be read"),
        ("--settings nabla-0.4 --ulysses_size 2", "ulysses_size 2 needs several processes"),
        ("--settings layers.yaml", "dense_layers 99 does not exist"),
    ),
)
def test_what_cannot_be_is_said_before_anything_is_made(run, made, tmp_path, flags, said, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("layers.yaml").write_text("attention: {algorithm: keep-0.4, dense_layers: [99]}")
    try:
        code = run(*flags.split())
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2 and said in error and "Traceback" not in error and made == []


def test_measures_that_cannot_be_taken_are_named_and_taken_later(run, made, clip, lpips, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(lpips, "LPIPS", lambda **_: (_ for _ in ()).throw(OSError("no network")))
        assert run("--settings", "nabla-0.4", "--clip", tmp_path) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "lpips: no network; torchmetrics is not installed" in results["missing"]["lpips"]
    assert str(tmp_path) in results["missing"]["clip"] and results["settings"][1]["lpips"] is None
    table = capsys.readouterr().out
    assert "No LPIPS: lpips: no network" in table and "| LPIPS" not in table and "PSNR, dB" in table
    assert run("--settings", "nabla-0.4", "--only_measure", "--clip", clip) == 0 and len(made) == 4
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["missing"] == {} and None not in [results["settings"][1][name] for name in ("lpips", "clip", "psnr")]
    # What an earlier run could take stays.
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert run("--settings", "nabla-0.4") == 0
    later = json.loads((tmp_path / "out" / "results.json").read_text())
    assert later["settings"] == results["settings"] and later["missing"] == {}


def test_torchmetrics_measures_where_lpips_is_not_there(monkeypatch):
    class Metric(torch.nn.Module):
        kept = 0

        def forward(self, one, two):
            self.kept += 1
            return (one - two).square().mean()

        def reset(self):
            self.kept = 0

    package, module, metric = ModuleType("torchmetrics"), ModuleType("torchmetrics.image.lpip"), Metric()
    package.__spec__ = importlib.machinery.ModuleSpec("torchmetrics", None)
    module.LearnedPerceptualImagePatchSimilarity = lambda net_type, reduction: metric
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setitem(sys.modules, "torchmetrics", package)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", module)
    found, (one, two) = likeness.load_lpips(CPU), (noise(3, 8, 8, 3, seed=seed) for seed in (0, 1))
    assert found.how == "torchmetrics, alex"
    squares = (one.double() - two.double()).square().mean() / 127.5**2
    assert found(one, two) == pytest.approx(squares.item(), rel=1e-5) and metric.kept == 0


@pytest.mark.parametrize("frames", (1, 5, 8))
def test_likeness_by_chunks_is_that_of_whole_videos(frames, monkeypatch):
    video = noise(frames, 24, 32, 3)
    other = (video.int() + noise(frames, 24, 32, 3, seed=1) % 9).clamp(0, 255).to(torch.uint8)
    monkeypatch.setattr(likeness, "CHUNK", 3 * video[0].numel())
    assert likeness.psnr(video, other, CPU) == pytest.approx(quality.psnr(video, other))
    assert likeness.ssim(video, other, CPU) == pytest.approx(quality.ssim(video, other))
    assert likeness.psnr(video, video, CPU) == likeness.MOST_DB and likeness.ssim(video, video, CPU) == pytest.approx(1)
    # One of so many numbers, off by one, is beyond what is told apart.
    almost = torch.zeros(frames, 200, 200, 3, dtype=torch.uint8)
    one_off = almost.clone()
    one_off[0, 0, 0, 0] = 1
    assert likeness.psnr(almost, one_off, CPU) == min(likeness.MOST_DB, quality.psnr(almost, one_off))


def test_clip_score_is_the_mean_cosine_of_frames_and_prompt(clip):
    score, video = load_clip(str(clip), CPU), noise(20, 40, 48, 3)
    text = score.tokenizer(["a red ball"], return_tensors="pt")
    cosines = []
    for number in (0, 3, 5, 8, 11, 14, 16, 19):
        given = score.pictures(images=[video[number].numpy()], return_tensors="pt")
        with torch.no_grad():
            found = score.model(**text, **given)
        cosines.append(torch.cosine_similarity(found.image_embeds, found.text_embeds).item())
    assert score(video, "a red ball") == pytest.approx(100 * np.mean(np.maximum(cosines, 0)), abs=1e-3)
    # Longer than CLIP's text may be.
    assert math.isfinite(score(video[:1], "a red ball " * 20))


def test_frames_are_kept_to_the_bit(tmp_path):
    for number, (shape, fps) in enumerate((((9, 34, 50, 3), 16), ((1, 16, 16, 3), 24), ((81, 16, 16, 3), 240))):
        video = noise(*shape, seed=number).numpy()
        write_lossless(tmp_path / f"{number}.mkv", video, fps)
        assert np.array_equal(frames_of(tmp_path / f"{number}.mkv"), video)


def test_intervals_hold_the_mean_as_often_as_they_say():
    generator = np.random.default_rng(1)
    held = [low <= 3 <= high for _, low, high, _ in (estimate(generator.normal(3, 2, 40), 500) for _ in range(300))]
    assert 0.90 < np.mean(held) < 0.98
    # Of two values, samples have one, the other or both, a quarter, a quarter and a half of the time.
    assert estimate([1.0, 3.0]) == (2.0, 1.0, 3.0, 2)
    many = generator.normal(0, 1, 50)
    assert estimate(many) == estimate(many) and estimate(many).low < many.mean() < estimate(many).high


def test_intervals_by_draws_at_once_are_those_by_single_draws():
    values = np.random.default_rng(0).normal(0, 1, 7)
    generator = np.random.default_rng(0)
    means = [values[generator.integers(0, 7, 7)].mean() for _ in range(1000)]
    found = estimate(values, 1000)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))))


def test_intervals_of_values_without_spread_or_without_company():
    assert estimate([0.1] * 9) == (0.1, 0.1, 0.1, 9)
    assert estimate([2.0]) == (2.0, None, None, 1) and estimate([]) is None
    # Videos of one prompt count as one.
    assert by_prompt([(0, 1.0), (1, 5.0), (0, 3.0)]) == [2.0, 5.0]


def test_settings_by_strings_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("both.yaml").write_text(
        "attention: {threshold: 0.6, mask_refresh: 2}\ncache: taylorseer:2\nsampling: {steps: 9}\n"
    )
    Path("cache.yaml").write_text("cache: first_block:0.1\n")
    Path("neither.yaml").write_text("video: {frame_num: 9}\n")
    found = read_compared(["sta-11-3-3", "dense", "both.yaml", "cache.yaml", "full.yaml", "nabla_0.4.yaml"])
    assert [one.name for one in found] == ["dense", "sta-11-3-3", "both", "cache", "nabla_0.4"] and found[0] == DENSE
    # As in a config a window alone begins dense.
    assert found[1].attention.dense_steps == 12 and found[2].attention.mask_refresh == 2
    assert found[2].cache.interval == 2 and found[3].attention.is_dense and not found[3].is_baseline
    made = found[2].of(settings_of("a"))
    assert (made.attention, made.cache, made.sampling.steps) == (found[2].attention, found[2].cache, 50)
    assert held_against(found, None) == found[1] and held_against(found, "dense") == DENSE
    for given, said in (
        (["nabla-0.4", "nabla-0.4"], "setting nabla-0.4 is given twice"),
        (["neither.yaml"], "names neither attention nor cache"),
        (["gone.yaml"], "is neither a file nor one of"),
        (["keep-2"], "keep"),
        (["nabla_0.4", "nabla-0.4"], "nabla_0.4"),
    ):
        with pytest.raises(InputError, match=said):
            read_compared(given)
    Path("mine.yaml").write_text("stretches: [{until: 1, keep: [1, 0.2]}]\n")
    _, profile = read_compared(["profile:mine.yaml"])
    assert profile.name == "mine" and profile.attention.profile.mean_keep == 0.6
    Path("nabla-0.4.yaml").write_text("attention: {algorithm: keep-0.5}\n")
    with pytest.raises(InputError, match="two settings would both be called nabla-0.4"):
        read_compared(["nabla-0.4", "nabla-0.4.yaml"])


def test_settings_say_nothing_else_than_generate_would(random_nano):
    from wan.models.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(random_nano)
    _, share, threshold = read_compared(["keep-0.4", "nabla-0.4"], checkpoint)
    asked = checkpoint.resolve({"prompt": "a", "attention": {"algorithm": "keep-0.4"}})
    assert share.attention == asked.attention != NablaConfig(keep=0.4) and share.attention.dense_steps > 0
    assert threshold.attention == NablaConfig(threshold=0.4)


def test_a_setting_may_say_what_goes_beside_the_algorithm_of_a_checkpoint(tmp_path, monkeypatch):
    from wan.models.checkpoint import Checkpoint

    monkeypatch.chdir(tmp_path)
    Path("kept.yaml").write_text("attention: {mask_refresh: 2}\n")
    assert not stands_alone("kept.yaml") and stands_alone("keep-0.4") and stands_alone("nabla_0.4.yaml")
    _, found = read_compared(["kept.yaml"], Checkpoint.open(ROOT / "checkpoints" / "wan-shapes"))
    assert (found.attention.keep, found.attention.mask_refresh) == (0.7, 2)


def test_a_first_seed_below_zero_is_refused():
    with pytest.raises(InputError, match="base_seed -5 is below 0; give one of 0 or more"):
        jobs_of([settings_of("a b")], base_seed=-5)


def test_jobs_have_the_same_seeds_whatever_is_added():
    jobs = jobs_of([settings_of("a b"), settings_of("c", seed=5)], 2, base_seed=100)
    assert [(job.name, job.settings.sampling.seed) for job in jobs] == [
        ("000-a-b-0", 100),
        ("001-c-0", 5),
        ("000-a-b-1", 100 + STRIDE),
        ("001-c-1", 5 + STRIDE),
    ]
    more = jobs_of([settings_of("a b"), settings_of("c", seed=5), settings_of("d")], 3, base_seed=100)
    assert set(jobs) <= set(more)
    # Few prompts are spread over all of them.
    many = jobs_of([settings_of(str(number)) for number in range(10)], 2)
    assert [job.prompt for job in shown(many, 3)] == [0, 3, 6] and len(shown(many, 99)) == 10


def test_vbench_takes_prompts_off_names_where_these_can_be():
    prompts = ["a b", "a b", "a/b", ".a", "x" * 300, "a\tb"]
    jobs = jobs_of([settings_of(one) for one in prompts], 2)
    names = names_of(jobs)
    assert names[:2] == ["a b-0.mp4", "a b-1.mp4"] and names[6:8] == ["a b-2.mp4", "a b-3.mp4"]
    assert len(set(names)) == len(names)
    assert all(name == f"{job.name}.mp4" for job, name in zip(jobs, names) if job.prompt > 1)


def test_prompts_that_come_with_the_program_are_fifty_that_differ():
    lines = (PROMPT_FOLDER / PROMPTS).read_text(encoding="utf-8").splitlines()
    assert len(set(lines)) == len(lines) == 50 and all(40 < len(line) < 160 and line.isprintable() for line in lines)
    assert len(set(names_of(jobs_of(list(map(settings_of, lines)))))) == 50


def test_progress_says_how_many_and_how_long():
    progress = Progress(["dense"] * 2 + ["nabla-0.4"] * 2)
    # Nothing is known of the other yet.
    assert progress.after(0, 30) == "1 of 4, 30.0 s a video, 01:30 left"
    # The first compiled.
    assert progress.after(1, 10) == "2 of 4, 10.0 s a video, 00:20 left"
    assert progress.after(2, 6) == "3 of 4, 6.0 s a video, 00:06 left"
    assert progress.after(3, 4) == "4 of 4, 4.0 s a video, 00:00 left"


def test_a_pipeline_of_anyone_s_making_is_evaluated(random_nano, tmp_path):
    pipe = wan.WanT2V.from_pretrained(random_nano)
    video, sampling = replace(pipe.video, size=(64, 64), frame_num=5), replace(pipe.sampling, steps=1)
    videos = [replace(settings_of("a red ball"), video=video, sampling=sampling)]
    compared = [DENSE, Compared("keep-0.4", NablaConfig(keep=0.4))]
    plan = Plan(jobs_of(videos), compared, compared[1], Folder(tmp_path / "out"), CPU)
    found = evaluate(plan, lambda: pipe)
    assert [one["videos"] for one in found["settings"]] == [1, 1] and found["settings"][1]["psnr"]["mean"] < 100
    # The one that was put on last is left on.
    assert pipe.transformer.nabla.config.keep == 0.4
    with pytest.raises(pytest.fail.Exception):
        evaluate(replace(plan, jobs=jobs_of(videos * 2)), lambda: pytest.fail("it is to be loaded"))


def test_videos_that_begin_with_a_picture(run, prompts, tmp_path):
    from wan.models.wan import random_checkpoint

    random_checkpoint.write("i2v-nano", tmp_path / "i2v", torch.float32)
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "red.png")
    prompts.write_text(json.dumps({"prompt": "it turns", "image": str(tmp_path / "red.png")}))
    assert run("--settings", "nabla-0.4", ckpt=tmp_path / "i2v") == 0
    Image.new("RGB", (64, 64), (30, 30, 200)).save(tmp_path / "red.png")
    assert run("--settings", "nabla-0.4", ckpt=tmp_path / "i2v") == 2


def test_another_family(run, kandinsky_nano, made, tmp_path):
    flags = "--settings nabla-0.4 --prompts 1 --size 128*128 --sample_guide_scale 1".split()
    assert run(*flags, ckpt=kandinsky_nano) == 0 and made == ["dense", "nabla-0.4"]


def test_two_processes_share_videos(random_nano, prompts, tmp_path):
    flags = ["--ckpt_dir", random_nano, "--prompt_file", prompts, *QUICK, "--settings", "nabla-0.4"]
    for layout, count in ((["--ulysses_size", 2, "--prompts", 1], 1), (["--replicas", 2], 2)):
        out = tmp_path / layout[0]
        code, printed, said = finish(
            fork(2, ROOT / "scripts" / "evaluate.py", *flags, *layout, "--out", out, cwd=tmp_path)
        )
        assert code == 0, said
        results = json.loads((out / "results.json").read_text())
        assert [one["videos"] for one in results["settings"]] == [count] * 2 and "| nabla-0.4" in printed
        assert results["settings"][1]["psnr"]["mean"] < 100
        assert results["made_on"]["processes"] == (2 if "--ulysses_size" in layout else 1)


def test_frames_are_those_that_generate_writes(random_nano, tmp_path, monkeypatch):
    """What `generate_video` writes is what `make_frames` gives."""
    seen = []
    monkeypatch.setattr(
        generation, "write_with_sidecar", lambda path, frames, fps, record: seen.append((frames, record))
    )
    from wan.run.request import Options

    pipe = wan.WanT2V.from_pretrained(random_nano)
    one = settings_of("a red ball", seed=3)
    one = replace(one, video=replace(pipe.video, size=(64, 64), frame_num=5), sampling=replace(one.sampling, steps=1))
    generation.generate_video(pipe, one, tmp_path / "a.mp4", Options(), 0.0)
    made = generation.make_frames(pipe, one, Options(), 0.0, generation.Recorder())
    (frames, record) = seen[0]
    assert np.array_equal(frames, made.frames) and record["settings"] == made.record["settings"]
