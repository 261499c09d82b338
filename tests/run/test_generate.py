"""generate.py from the command line: what it writes, what it says, and one clear line for every wrong input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
import torch._inductor.config
import weight_files
from places import ROOT
from safetensors.torch import load_file
from starting import Forked, finish
from torch.distributed.run import get_args_parser

import generate
from wan import WanT2V
from wan.files import video
from wan.models.wan.layout import TOKENIZER_FOLDER, VAE_FILE
from wan.models.wan.random_checkpoint import random_transformer
from wan.run.flags import make_parser, parse_args


@pytest.fixture
def run(random_nano, tmp_path, monkeypatch, capsys):
    """Run generate.py in an empty directory: `run(*flags)` -> (exit code, what it printed, files it left).

    It may make a video again where there is one, unless told otherwise.
    """
    monkeypatch.chdir(tmp_path)

    def run(
        *flags: str,
        ckpt_dir: Path | str | None = random_nano,
        prompt: str | None = "A red circle",
        overwrite: bool = True,
    ):
        small = {"--size": "64*48", "--frame_num": "5", "--sample_steps": "2", "--base_seed": "1", "--device": "cpu"}
        small |= {"--save_file": "out.mp4"}
        small |= {} if ckpt_dir is None else {"--ckpt_dir": str(ckpt_dir)}
        small |= {} if prompt is None else {"--prompt": prompt}
        defaults = [word for flag, value in small.items() if flag not in flags for word in (flag, value)]
        defaults += ["--overwrite"] if overwrite else []
        try:
            code = generate.main([*defaults, *flags])
        except SystemExit as left:
            code = left.code
        files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
        return code, capsys.readouterr().err, files

    return run


def test_writes_the_video_and_its_settings_and_can_make_it_again(run, tmp_path):
    code, said, files = run("--config", "nabla_0.7.yaml")
    assert code == 0 and files == ["out.json", "out.mp4"]
    frames = iio.imread("out.mp4")
    assert frames.shape == (5, 48, 64, 3)
    meta = iio.immeta("out.mp4")
    assert meta["fps"] == 16 and "h264" in meta["codec"]
    assert "attention: nabla-0.7, backend gather, grid 2x3x4 = 24 tokens, 2 blocks of 64 tokens, 2 of them" in said
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["settings"]["sampling"]["seed"] == 1 and record["made_with"]["versions"]["torch"] == torch.__version__
    again = generate.main(["--config", "out.json", "--save_file", "again.mp4", "--device", "cpu"])
    assert again == 0 and (iio.imread("again.mp4") == frames).all()
    assert json.loads((tmp_path / "again.json").read_text())["settings"] == record["settings"]


def test_a_record_of_packed_weights_says_that_they_are_not_packed_again(run, tmp_path):
    run()
    record = json.loads((tmp_path / "out.json").read_text())
    record["made_with"] |= {"memory": 12, "plan": {"packing": "int4", "text_packing": None}}
    (tmp_path / "packed.json").write_text(json.dumps(record))
    _, said, _ = run("--config", "packed.json")
    assert (
        "warning: packed.json was made with the transformer in int4 (here float32), so this video will differ; "
        "--memory 12 packs as there, if as much is free\n"
    ) in said
    assert "will differ" not in run("--config", "out.json")[1]


def test_seed_and_prompt_change_the_video_and_an_unset_seed_is_drawn_and_kept(run, tmp_path):
    run()
    first = iio.imread("out.mp4")
    for flags in (("--base_seed", "2"), ("--prompt", "A blue boat"), ("--negative_prompt", "night")):
        run(*flags)
        assert (iio.imread("out.mp4") != first).any()
    (tmp_path / "seed.yaml").write_text("sampling: {seed: 3}")
    drawn = set()
    for _ in range(2):
        run("--base_seed", "-1", "--config", "seed.yaml")
        drawn.add(json.loads((tmp_path / "out.json").read_text())["settings"]["sampling"]["seed"])
    assert len(drawn) == 2 and min(drawn) >= 0 and 3 not in drawn


def test_a_record_keeps_the_dtype_and_finds_the_checkpoint_from_elsewhere(run, random_nano, tmp_path, monkeypatch):
    monkeypatch.chdir(random_nano.parent)
    assert run("--dtype", "bfloat16", "--save_file", str(tmp_path / "out.mp4"), ckpt_dir="nano")[0] == 0
    monkeypatch.chdir(tmp_path)
    assert generate.main(["--config", "out.json", "--save_file", "again.mp4", "--device", "cpu"]) == 0
    assert (iio.imread("again.mp4") == iio.imread("out.mp4")).all()


def test_lora_and_transformer_change_the_video_and_stand_in_its_record(run, random_nano, tmp_path, monkeypatch):
    model = random_transformer("nano", torch.float32, torch.device("cpu"))
    factors = weight_files.draw_factors(model)
    for naming in ("wan", "comfyui", "diffusers"):
        weight_files.write_lora(tmp_path / f"{naming}.safetensors", factors, naming)
    state = load_file(next(random_nano.glob("*.safetensors")))
    weight_files.write_float8(tmp_path / "float8.safetensors", state)
    run()
    plain, made = iio.imread("out.mp4"), {}
    for naming in ("wan", "comfyui", "diffusers"):
        code, said, _ = run("--lora", f"{naming}.safetensors:0.8")
        assert code == 0 and f"lora: {tmp_path}/{naming}.safetensors at 0.8, 20 layers, merged into the weights" in said
        made[naming] = iio.imread("out.mp4")
    assert (made["wan"] == made["comfyui"]).all() and (made["wan"] == made["diffusers"]).all()
    assert (made["wan"] != plain).any()
    flags = ("--lora", "wan.safetensors:0.5", "--lora", "comfyui.safetensors", "--transformer", "float8.safetensors")
    code, said, _ = run(*flags, "--config", "turbo.yaml")
    assert code == 0 and f"transformer: {tmp_path}/float8.safetensors" in said
    settings = json.loads((tmp_path / "out.json").read_text())["settings"]
    assert [(Path(one["file"]).name, one["scale"]) for one in settings["lora"]] == [
        ("wan.safetensors", 0.5),
        ("comfyui.safetensors", 1.0),
    ]
    frames = iio.imread("out.mp4")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert generate.main(["--config", "../out.json", "--save_file", "again.mp4", "--device", "cpu"]) == 0
    assert (iio.imread("again.mp4") == frames).all()


def test_t2i_writes_one_picture(run):
    code, _, files = run("--task", "t2i-14B", "--save_file", "out.png", "--frame_num", "1")
    assert code == 0 and files == ["out.json", "out.png"]
    assert iio.imread("out.png").shape == (48, 64, 3)


def test_without_save_file_the_prompt_names_the_video(random_nano, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--prompt", "A cat, at night!", "--ckpt_dir", str(random_nano), "--size", "32*32", "--device", "cpu"]
    flags += ["--sample_steps", "1", "--sample_guide_scale", "1"]
    for frames, suffix in (("5", ".mp4"), ("1", ".png")):
        assert generate.main([*flags, "--frame_num", frames]) == 0
        assert len(list(tmp_path.glob(f"A-cat-at-night-????????{suffix}"))) == 1


def test_other_flags_of_wan(run):
    flags = (
        "--sample_solver dpm++ --sample_shift 3 --sample_guide_scale 1 --t5_cpu --offload_model true --dtype bfloat16"
    )
    code, said, _ = run(*flags.split(), "--sparse_algo", "sta-1-1-1")
    assert code == 0
    assert "warning: the first 12 steps run dense, so all 2 steps do" in said
    assert "sta-1-1-1, first 12 steps dense" in said and "cpu in bfloat16" in said and "2 steps of dpm++" in said


def test_few_steps_without_guidance_warn_unless_weights_are_added_or_the_checkpoint_wants_them(run, damaged, tmp_path):
    mush = "warning: 2 steps without guidance suit weights distilled for it, which --lora or --transformer add; unless "
    assert f"{mush}{damaged} itself is distilled, expect mush\n" in run("--config", "turbo.yaml", ckpt_dir=damaged)[1]
    weight_files.write_float8(tmp_path / "a.safetensors", load_file(next(damaged.glob("*.safetensors"))))
    assert "warning" not in run("--config", "turbo.yaml", "--transformer", "a.safetensors", ckpt_dir=damaged)[1]
    (damaged / "defaults.yaml").write_text("sampling: {guide_scale: 1}\n")
    assert "warning" not in run("--config", "turbo.yaml", ckpt_dir=damaged)[1]


def test_a_negative_prompt_without_guidance_is_refused_as_a_flag_and_warned_of_elsewhere(run, tmp_path):
    without = "has no effect without guidance (guide_scale 1); raise --sample_guide_scale, or leave it out\n"
    code, said, files = run("--negative_prompt", "night", "--sample_guide_scale", "1")
    assert (code, said, files) == (2, f"error: negative_prompt 'night' {without}", [])
    assert run("--negative_prompt", "", "--sample_guide_scale", "1", "--sample_steps", "13")[0] == 0
    (tmp_path / "mine.yaml").write_text("sampling: {negative_prompt: night}\n")
    code, said, _ = run("--config", "mine.yaml", "--sample_guide_scale", "1")
    assert code == 0 and f"warning: negative_prompt 'night' {without}" in said


def test_float8_and_the_cache_of_a_config_can_be_switched_off(run, tmp_path):
    assert run("--config", "fast.yaml", "--fp8", "false", "--cache", "none")[0] == 0
    settings = json.loads((tmp_path / "out.json").read_text())["settings"]
    assert settings["fp8"] is False and settings["cache"] == "none"
    assert settings["attention"]["algorithm"] == "nabla-0.7"


def test_flag_beats_yaml_beats_checkpoint_and_a_disagreement_is_one_line(run, damaged):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"sparse_algo": "nabla-0.9"}))
    said = run(ckpt_dir=damaged)[1]
    assert "attention: nabla-0.9," in said and "warning" not in said
    said = run("--config", "nabla_0.7.yaml", ckpt_dir=damaged)[1]
    assert "attention: nabla-0.7," in said
    assert [line for line in said.splitlines() if "warning" in line] == [
        f"warning: checkpoint {damaged} was made for nabla-0.9; running nabla-0.7 as asked"
    ]
    assert "attention: dense," in run("--config", "nabla_0.7.yaml", "--sparse_algo", "dense", ckpt_dir=damaged)[1]


def test_an_algorithm_of_the_checkpoint_that_is_not_understood(run, damaged):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"sparse_algo": "weird"}))
    code, said, _ = run(ckpt_dir=damaged)
    assert code == 2 and f"{damaged}, sparse_algo of its configuration: " in said
    code, said, _ = run("--sparse_algo", "dense", ckpt_dir=damaged)
    assert code == 0 and "warning: " in said and "running dense as asked" in said


def test_sampling_defaults_from_the_checkpoint(run, damaged):
    (damaged / "defaults.yaml").write_text("sampling: {solver: dpm++, steps: 3, shift: 2.0}\nvideo: {fps: 8}\n")
    _, said, _ = run(ckpt_dir=damaged)
    assert "2 steps of dpm++" in said
    assert iio.immeta("out.mp4")["fps"] == 8


def test_defaults_of_a_checkpoint_keep_its_algorithm_and_name_no_prompt(run, damaged):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"sparse_algo": "nabla-.9"}))
    (damaged / "defaults.yaml").write_text("attention: {backend: reference, dense_layers: [1]}\n")
    said = run(ckpt_dir=damaged)[1]
    assert "attention: nabla-0.9, layers 1 dense, backend reference" in said and "warning" not in said
    (damaged / "defaults.yaml").write_text("prompt: a dog\n")
    code, said, _ = run(ckpt_dir=damaged)
    assert code == 2 and "defaults.yaml may not name a prompt" in said


@pytest.mark.parametrize(
    "flags, message",
    (
        ("--size 64*50", "size 64*50: both must be positive multiples of 16; the nearest below is 64*48"),
        ("--size huge", "size 'huge' is not of the form width*height"),
        ("--frame_num 6", "frame_num 6 is not of the form 4n+1; use 5 or 9"),
        ("--frame_num six", "argument --frame_num: invalid int value: 'six'"),
        ("--sparse_algo nabla-1.5", "threshold 1.5 is outside (0, 1]"),
        ("--sparse_algo nabla-0", "threshold 0.0 is outside (0, 1]"),
        ("--sparse_algo sta-3-0-3", "window (3, 0, 3) is not three positive integers"),
        ("--sparse_algo sparse", "attention algorithm 'sparse' is not known"),
        ("--sample_solver heun", "solver 'heun' is not known"),
        ("--sample_steps 0", "steps 0 is not a whole number from 1 to 1000"),
        ("--sample_shift -1", "shift -1.0 is not a positive number"),
        ("--sample_shift nan", "shift nan is not a positive number"),
        ("--sample_guide_scale inf", "guide_scale inf is not a number"),
        ("--sample_guide_scale 0", "guide_scale 0.0 is not a number of at least 1"),
        ("--base_seed -7", "seed -7 is not a whole number"),
        ("--config none.yaml", "config 'none.yaml' is neither a file nor one of fast.yaml, full.yaml"),
        ("--task t2v-70B", "argument --task: invalid choice: 't2v-70B'"),
        ("--task t2i-14B --save_file out.png", "frame_num 5: task t2i-14B makes one picture"),
        ("--task t2i-14B --frame_num 1", "task t2i-14B makes a picture; end it in .png"),
        ("--save_file no/such/folder/out.mp4", "cannot be written (No such file or directory)"),
        ("--save_file out.avi", "save_file out.avi must end in .mp4"),
        ("--save_file out.png", "must end in .mp4 for 5 frames"),
        (f"--save_file {'x' * 300}.mp4", "cannot be written (File name too long)"),
        ("--ckpt_dir ~nobody-here/x", "checkpoint '~nobody-here/x' is neither a directory nor a hub id"),
        ("--device tpu", "device 'tpu' cannot be used"),
        ("--device meta", "device 'meta' cannot be used"),
        ("--offload_model maybe", "'maybe' is neither true nor false"),
        ("--fp8", "fp8 does not work on cpu: it needs an NVIDIA GPU"),
        ("--fp8 --dtype bfloat16 --ckpt_dir nobody/none", "fp8 does not work on cpu: it needs an NVIDIA GPU"),
        ("--config fast.yaml", "or more; leave fp8 out, or --fp8 false where a config asks for it"),
        ("--fp8 maybe", "'maybe' is neither true nor false"),
        ("--vae_dtype int8", "argument --vae_dtype: invalid choice: 'int8'"),
        ("--mask_refresh 0", "mask_refresh 0: give a whole number of sampling steps"),
        ("--mask_refresh 3", "mask_refresh 3 has no use for dense"),
        ("--ulysses_size 2", "ulysses_size 2 needs several processes; start with torchrun"),
        ("--dit_fsdp", "dit_fsdp True needs several processes"),
        ("--lora none.safetensors:0.5 --ckpt_dir nobody/none", "none.safetensors is not a file; check the path"),
        ("--lora style.pt", "style.pt must end in .safetensors; other formats can hold code and are not read"),
        ("--lora style.safetensors:inf", "lora scale inf is not a number from -100 to 100; 1.0 is usual"),
        ("--transformer w.pth --ckpt_dir nobody/none", "w.pth must end in .safetensors or .gguf; other formats can"),
        ("--unknown 1", "unrecognized arguments: --unknown 1"),
    ),
)
def test_wrong_flags(run, flags, message):
    code, said, files = run(*flags.split())
    assert code == 2 and files == []
    assert said.count("\n") == 1 and said.startswith("error: ") and message in said


def test_a_task_of_another_size_than_the_config_s_checkpoint(run):
    code, said, _ = run("--config", "nabla_0.7.yaml", "--task", "t2v-1.3B", ckpt_dir=None)
    assert code == 2 and said.startswith("error: task t2v-1.3B: config nabla_0.7.yaml names ai-forever/Wan2.1-T2V-14B")


def test_a_file_that_is_not_a_record_is_not_overwritten(run, tmp_path):
    (tmp_path / "out.json").write_text('{"mine": 1}')
    code, said, files = run()
    assert (code, files) == (2, ["out.json"]) and "out.json exists and is not the record of a video" in said


def test_without_ffmpeg_nothing_is_begun(run, monkeypatch):
    def missing() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", missing)
    code, said, files = run()
    assert (code, files) == (
        2,
        [],
    ) and said.startswith("error: videos need ffmpeg, and there is none; pip install imageio-ffmpeg, or let ")


def test_a_prompt_that_is_not_unicode(run):
    code, said, files = run(prompt="a \udcff cat")
    assert (code, files) == (2, []) and "prompt is not valid Unicode" in said


@pytest.mark.parametrize("prompt", ("", "   ", "&nbsp;", None))
def test_empty_prompt(run, prompt):
    code, said, files = run(prompt=prompt)
    assert (code, files) == (
        2,
        [],
    ) and said == "error: the prompt is empty; say what the video should show with --prompt\n"


def test_unknown_key_in_a_yaml(run, tmp_path):
    (tmp_path / "mine.yaml").write_text("attention: {algorithm: nabla, threshold: 0.7, windw: [3, 3, 3]}\n")
    code, said, files = run("--config", "mine.yaml")
    assert (code, files) == (2, ["mine.yaml"]) and "attention has an unknown key 'windw'; allowed are" in said


@pytest.mark.parametrize("part", (VAE_FILE, f"{TOKENIZER_FOLDER}/tokenizer.json"))
def test_missing_part_of_a_checkpoint(run, damaged, part):
    (damaged / part).unlink()
    code, said, files = run(ckpt_dir=damaged)
    assert code == 2 and "out.mp4" not in files
    assert said.count("\n") == 1 and f"{part} is missing" in said


@pytest.mark.parametrize("part", (VAE_FILE, f"{TOKENIZER_FOLDER}/tokenizer.json"))
def test_corrupt_part_of_a_checkpoint(run, damaged, part):
    data = (damaged / part).read_bytes()
    (damaged / part).write_bytes(data[: len(data) // 2])
    code, said, _ = run(ckpt_dir=damaged)
    assert code == 2 and said.splitlines()[-1].startswith("error: ") and "download it again" in said
    assert "Traceback" not in said


def test_a_checkpoint_that_cannot_be_had_says_which_how_and_what_else(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, said, files = run("--config", "nabla_0.6_sta_11_3_3.yaml", ckpt_dir=None)
    assert code == 2 and files == [] and said.count("\n") == 1
    name = "ai-forever/Wan2.1-T2V-14B-NABLA-0.6-STA-11-3-3"
    assert f"checkpoint {name} is not a directory" in said
    assert f"hf download {name} --local-dir DIR" in said and "make_random_checkpoint.py --model nano" in said


def test_out_of_memory_says_what_to_lower(run, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(WanT2V, "generate", exhausted)
    code, said, files = run()
    assert (code, files) == (2, [])
    assert said.splitlines()[-1] == (
        "error: the GPU ran out of memory; try a smaller --size than 64*48, fewer than 5 frames (--frame_num), "
        "--offload_model true or --t5_cpu"
    )


def test_a_machine_without_memory_is_one_line(run, monkeypatch):
    def exhausted(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 256 GB")

    monkeypatch.setattr(WanT2V, "generate", exhausted)
    code, said, files = run()
    assert (code, files) == (2, []) and "the machine ran out of memory; try a smaller --size" in said.splitlines()[-1]


def test_an_encoder_that_fails_leaves_nothing_and_what_was_there(run, tmp_path, monkeypatch):
    run()
    before = [(path, path.read_bytes()) for path in (tmp_path / "out.mp4", tmp_path / "out.json")]
    real = video.encoder()
    dying = tmp_path / "dying"
    # Without its last frames, or cut, both with code 0; or whole, with another code.
    ends = (f'head -c {3 * 64 * 48 * 3} | {real} "$@"', f'{real} "$@"; truncate -s 300 "$out"', f'{real} "$@"; exit 3')
    for end in ends:
        dying.write_text(
            f'#!/bin/bash\nfor out; do :; done\ncase $out in *out.mp4) {end};; *) exec {real} "$@";; esac\n'
        )
        dying.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(dying))
        code, said, files = run("--base_seed", "2")
        assert code == 2 and "out.mp4 could not be written: encoder" in said.splitlines()[-1]
        assert str(dying) in said.splitlines()[-1] and files == ["dying", "out.json", "out.mp4"]
        assert all(path.read_bytes() == content for path, content in before)


@pytest.mark.parametrize("named", ("/none/ffmpeg", "no_h264", "cannot_write"))
def test_an_encoder_that_cannot_write_is_found_before_anything_is_loaded(run, tmp_path, monkeypatch, named):
    scripts = {
        "no_h264": "echo Unknown encoder libx264 >&2; exit 1",
        "cannot_write": "echo Permission denied >&2; exit 1",
    }
    if named in scripts:
        (tmp_path / named).write_text(f"#!/bin/sh\n{scripts[named]}\n")
        (tmp_path / named).chmod(0o755)
        named = str(tmp_path / named)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", named)
    code, said, files = run(ckpt_dir="nobody/none")
    assert code == 2 and said.count("\n") == 1 and f"encoder {named} " in said and "libx264" in said
    assert not [name for name in files if name.endswith((".mp4", ".json"))]


def test_without_a_compiler_nothing_is_loaded(run, monkeypatch):
    monkeypatch.setenv("CXX", "/none/g++")
    with torch._inductor.config.patch({"cpp.cxx": ("/none/g++",)}):
        code, said, files = run("--compile", "true", ckpt_dir="nobody/none")
    assert (code, files) == (2, []) and said.count("\n") == 1
    assert "compile true needs a C++ compiler, and none can be run here (CXX is '/none/g++'): install g++" in said


def test_a_finished_video_is_not_replaced_unless_told(run, tmp_path):
    run()
    before = (tmp_path / "out.mp4").read_bytes(), (tmp_path / "out.json").read_bytes()
    code, said, _ = run(overwrite=False)
    assert code == 0 and said.splitlines()[-1] == "made already: out.mp4; --overwrite makes it again"
    for other in (["--base_seed", "2"], ["--base_seed", "-1"], ["--sample_steps", "3"]):
        code, said, _ = run(*other, overwrite=False)
        assert code == 2 and "out.mp4 is there already; give --overwrite to replace it, or choose another" in said
    assert before == ((tmp_path / "out.mp4").read_bytes(), (tmp_path / "out.json").read_bytes())
    code, said, _ = run("--frame_num", "1", "--save_file", "out.png")
    assert code == 2 and "out.json is the record of out.mp4; choose another --save_file" in said
    (tmp_path / "out.mp4").write_bytes(b"half")
    assert run(overwrite=False)[0] == 0 and (tmp_path / "out.mp4").read_bytes() == before[0]
    (tmp_path / "out.json").unlink()
    code, said, _ = run(overwrite=False)
    assert code == 2 and "out.mp4 is there already, without its record; give --overwrite" in said


def test_bugs_keep_their_traceback(run, monkeypatch):
    monkeypatch.setattr(WanT2V, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()


def test_an_interrupted_run_writes_nothing(run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(WanT2V, "generate", interrupt)
    code, said, files = run()
    assert (code, files) == (130, []) and said.splitlines()[-1] == "interrupted; no half-written file is left"


def test_flags_are_not_taken_for_torchrun_s():
    known = {name for action in get_args_parser()._actions for name in action.option_strings}
    flags = re.findall(r"^  (?:-h, )?(--\w+)", make_parser().format_help(), re.MULTILINE)
    assert len(flags) > 30 and "--log_file" in flags
    for flag in set(flags) - {"--help"}:
        assert not [name for name in known if name.startswith(flag)]
        assert get_args_parser().parse_args(["generate.py", flag, "1"]).training_script_args == [flag, "1"]
    assert parse_args(["--log", "x.jsonl"]).log_file == Path("x.jsonl")


def test_as_a_program_from_another_directory(tmp_path):
    command = [sys.executable, str(ROOT / "generate.py"), "--prompt", "a cat", "--size", "17*16"]
    plain = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert plain.returncode == 2 and plain.stderr.startswith("error: size 17*16") and not plain.stdout
    code, shown, _ = finish(Forked(ROOT / "generate.py", "--help", cwd=tmp_path))
    assert code == 0 and "--sparse_algo" in shown


def test_random_checkpoint_script(tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / "make_random_checkpoint.py"), "--model", "nano"]
    made = subprocess.run(
        [*script, "--out", str(tmp_path / "x"), "--sparse_algo", "nabla-0.7"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert json.loads((tmp_path / "x" / "config.json").read_text())["sparse_algo"] == "nabla-0.7"
    code, _, said = finish(Forked(*script[1:], "--out", tmp_path / "y", "--sparse_algo", "x", cwd=tmp_path))
    assert code == 2 and said.startswith("error: attention algorithm 'x'") and not (tmp_path / "y").exists()
