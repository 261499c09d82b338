"""Settings: parsing, precedence, every file in configs/, and one clear line for each bad value."""

from __future__ import annotations

import datetime
import json
import os
import re

import pytest

from nabla import InputError, NablaConfig
from wan.config.attention_settings import STA_DENSE_STEPS
from wan.config.cache_settings import CacheSettings
from wan.config.config_files import CONFIG_FOLDER, read_settings
from wan.config.settings import Settings, resolve
from wan.files.plain_data import parse_yaml
from wan.run.ratios import measured_otherwise
from wan.sampling.solvers import make_solver

ROOM = {"checkpoint": "somewhere", "prompt": "a cat"}


@pytest.mark.parametrize(
    "algorithm, config",
    (
        ("dense", NablaConfig()),
        ("nabla-0.7", NablaConfig(threshold=0.7)),
        ("sta-11-3-3", NablaConfig(window=(11, 3, 3))),
        ("nabla-0.6_sta-11-3-3", NablaConfig(threshold=0.6, window=(11, 3, 3))),
        ("keep-0.2", NablaConfig(keep=0.2)),
        ("nabla-1e-05", NablaConfig(threshold=1e-5)),
        ("nabla-0.7_pool-1-4-4", NablaConfig(threshold=0.7, pool=(1, 4, 4))),
        ("keep-0.1_pool-1-4-4_sta-11-3-3", NablaConfig(keep=0.1, pool=(1, 4, 4), window=(11, 3, 3))),
        ("nabla-0.7_min-0.05_max-0.3", NablaConfig(threshold=0.7, keep_min=0.05, keep_max=0.3)),
        ("keep-0.1_dropped-mean", NablaConfig(keep=0.1, dropped="mean")),
    ),
)
def test_algorithm_strings_both_ways(algorithm, config):
    assert NablaConfig.parse(algorithm) == config
    assert config.algorithm == algorithm


@pytest.mark.parametrize(
    "text",
    (
        "",
        "nabla",
        "nabla-",
        "sta-1-2",
        "nabla-0.5_nabla-0.6",
        "nabla_0.7",
        "sta-a-b-c",
        "x",
        "keep-0.1_nabla-0.1",
        "pool-4-4",
        "keep-0.1_dropped",
    ),
)
def test_unknown_algorithm_strings(text):
    with pytest.raises(InputError, match="is not known; use dense, nabla-0.7, keep-0.2.*_pool-1-4-4"):
        NablaConfig.parse(text)


@pytest.mark.parametrize(
    "settings, message",
    (
        ({"threshold": 0}, r"threshold 0 is outside \(0, 1\]"),
        ({"threshold": 1.5}, r"threshold 1.5 is outside \(0, 1\]"),
        ({"threshold": -0.1}, "outside"),
        ({"threshold": "high"}, "outside"),
        ({"threshold": float("nan")}, "outside"),
        ({"keep": 2}, r"keep 2 is outside \(0, 1\]"),
        ({"threshold": 0.5, "keep": 0.5}, "alternatives"),
        ({"window": (3, 3)}, "window .* is not three positive integers"),
        ({"window": (3, 0, 3)}, "not three positive integers"),
        ({"window": (3, 1.5, 3)}, "not three positive integers"),
        ({"window": "11-3-3"}, "not three positive integers"),
        ({"tile": (0, 8, 8)}, "tile .* is not three positive integers"),
        ({"tile": (1, 100000, 100000)}, "at most 1024 are allowed"),
        ({"window": {11, 3, 5}}, "not three positive integers"),
        ({"keep": 0.1, "pool": (1, 3, 4)}, r"pool \(1, 3, 4\) does not divide tile \(1, 8, 8\)"),
        ({"keep": 0.1, "pool": (1, 4)}, "pool .* is not three positive integers"),
        ({"pool": (1, 4, 4)}, r"pool \(1, 4, 4\) has no use for dense"),
        ({"keep": 0.1, "keep_max": 0.2}, "^keep_max 0.2 limits a threshold, and none is given; leave it out"),
        ({"threshold": 0.1, "keep_min": 0}, r"keep_min 0 is outside \(0, 1\]"),
        ({"threshold": 0.1, "keep_min": 0.3, "keep_max": 0.2}, "keep_min 0.3 is more than keep_max 0.2"),
        ({"keep": 0.1, "dropped": "max"}, "dropped 'max' is not known; use one of none, mean"),
        ({"dropped": "mean"}, "dropped 'mean' has no use for dense"),
        ({"dense_steps": -1}, "dense_steps -1"),
        ({"dense_steps": True}, "dense_steps True"),
        ({"mask_refresh": 0, "keep": 0.1}, "mask_refresh 0: give a whole number of sampling steps, 1 or more"),
        ({"mask_refresh": 2}, "mask_refresh 2 has no use for dense"),
        ({"mask_refresh": 2, "window": (3, 3, 3)}, "mask_refresh 2 has no use for sta"),
        ({"dense_layers": (1, -1)}, "dense_layers"),
        ({"dense_layers": "all"}, "dense_layers"),
        ({"backend": "cuda"}, "backend 'cuda' is not known; use one of auto"),
    ),
)
def test_values_outside_what_is_allowed(settings, message):
    with pytest.raises(InputError, match=message):
        NablaConfig(**settings)


@pytest.mark.parametrize(
    "settings, message",
    (
        ({"algorithm": "nabla"}, r"takes a threshold \(or keep\), but given are no threshold and no window"),
        ({"algorithm": "sta", "window": [3, 3, 3], "threshold": 0.5}, "takes a window, but given are a threshold"),
        ({"algorithm": "dense", "threshold": 0.5}, "takes no threshold and no window"),
        ({"algorithm": "nabla-0.7", "threshold": 0.5}, "carries its numbers already; remove a threshold"),
        ({"algorithm": "keep-0.1_pool-1-4-4", "pool": [1, 2, 2]}, "says its pool already; remove the other"),
        ({"algorithm": ["nabla"]}, r"algorithm \['nabla'\] is not known"),
        ({"algorithm": 3}, "algorithm 3 is not known"),
        ({1: 2, "a": 3}, "unknown key '1'"),
        ({"dense_layers": 1}, "dense_layers 1: give a list"),
        ({"algorithm": "nabla", "treshold": 0.5}, "unknown key 'treshold'; allowed are algorithm"),
    ),
)
def test_attention_mappings_that_do_not_fit(settings, message):
    with pytest.raises(InputError, match=message):
        resolve(ROOM | {"attention": settings})


@pytest.mark.parametrize(
    "layer, message",
    (
        ({"video": {"size": "1280*721"}}, r"size 1280\*721: both must be positive multiples of 16; .* 1280\*720"),
        ({"video": {"size": "0*16"}}, "multiples of 16"),
        ({"video": {"size": "big"}}, "size 'big' is not of the form"),
        ({"video": {"frame_num": 80}}, r"frame_num 80 is not of the form 4n\+1; use 77 or 81"),
        ({"video": {"frame_num": 0}}, r"4n\+1; use 1 or 5"),
        ({"video": {"fps": 0}}, "fps 0"),
        ({"video": {"length": 3}}, "video has an unknown key 'length'"),
        ({"video": 3}, "video 3 is not a mapping"),
        ({"sampling": {"steps": 0}}, "steps 0"),
        ({"sampling": {"steps": 2.5}}, "steps 2.5"),
        ({"sampling": {"shift": 0}}, "shift 0"),
        ({"sampling": {"guide_scale": 0.5}}, "guide_scale 0.5"),
        ({"sampling": {"solver": "heun"}}, "solver 'heun' is not known; use one of unipc, dpm"),
        ({"sampling": {"seed": -3}}, "seed -3"),
        ({"sampling": {"negative_prompt": 3}}, "negative_prompt 3"),
        ({"sampling": {"cfg": 3}}, "sampling has an unknown key 'cfg'"),
        ({"model": "x"}, "the settings has an unknown key 'model'"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": 3}, "prompt 3 is not a text"),
        ({"checkpoint": 3}, "checkpoint 3 is not a directory or a hub id"),
        ({"sampling": {"shift": 10**400}}, "is not a positive number"),
        ({"video": {"fps": 1000}}, "fps 1000 is not a whole number from 1 to 240"),
        ({"dtype": "int8"}, "dtype 'int8' is not known; use one of bfloat16"),
        ({"sampling": {"seed": True}}, "seed True"),
        ({"sampling": {"steps": 10**11}}, "from 1 to 1000"),
        ({"sampling": {"shift": True}}, "shift True"),
        ({"sampling": {"shift": float("inf")}}, "shift inf"),
        ({"video": {"frame_num": float("nan")}}, r"frame_num nan is not of the form 4n\+1"),
        ({"video": {"size": [64.9, 48.2]}}, "is not of the form"),
        ({"video": {"size": {64: 1, 48: 2}}}, "is not of the form"),
        ({"sampling": {"shift": 101}}, "shift 101 is not a positive number up to 100"),
        ({"sampling": {"guide_scale": 1e30}}, "guide_scale 1e.30 is not a number of at least 1 .* at most 100"),
        ({"lora": ["a.safetensors:-101"]}, "lora scale -101.0 is not a number from -100 to 100"),
        ({"lora": [{"file": "a.safetensors", "scale": 1e9}]}, "lora scale 1000000000.0 is not a number from"),
        ({"sampling": {"negative_prompt": "a " * 30_000}}, "negative_prompt has 60000 characters; shorten it"),
        ({"cache": 0}, "cache 0 is neither none, nor"),
        ({"cache": {"kind": "mag", "ratios": [1], "max_skips": 10**60}}, "not a whole number of steps up to 1000"),
        ({"cache": {"kind": "taylorseer", "interval": 1e9}}, "interval 1000000000.0 is not a whole number of steps"),
        ({"attention": {"algorithm": "sta", "window": [10**60, 1, 1]}}, "is not three positive integers"),
        ({"attention": {"dense_steps": 10**60}}, "dense_steps 10+: give a whole number"),
    ),
)
def test_bad_settings(layer, message):
    with pytest.raises(InputError, match=message):
        resolve(layer, ROOM)


@pytest.mark.parametrize("name", ("checkpoint", "transformer", "lora file", "config", "cache ratios"))
@pytest.mark.parametrize(
    "path, message",
    (
        ("n" * 300, " 'nnn.* is too long: a name of 300 bytes; a name has at most 255"),
        ("x/" * 3000, " 'x/x.* is too long: a path of 6000 bytes"),
        ("a\0b", r" 'a.x00b' holds a null character"),
        ("a\ud800", r" 'a.ud800' is not valid Unicode"),
    ),
)
def test_paths_that_no_file_can_have(name, path, message):
    given = {"checkpoint": path, "transformer": path, "lora file": [path], "cache ratios": f"mag:0.1:{path}"}
    with pytest.raises(InputError, match=name + message):
        if name == "config":
            read_settings(path)
        resolve({name.split()[0]: given[name]}, ROOM)


LOOP: dict = {}
LOOP["x"] = LOOP


@pytest.mark.parametrize(
    "measured_on",
    (
        {"when": datetime.date(2026, 1, 1)},
        {"x": float("nan")},
        {"x": {1, 2}},
        {"x": "\ud800"},
        {"x": 10**100},
        {1: 2, "1": 3},
        LOOP,
    ),
)
def test_what_ratios_hold_for_must_fit_a_record(measured_on):
    with pytest.raises(InputError, match="cache measured_on cannot be written to a record"):
        CacheSettings("mag", ratios=(1.0, 1.0), measured_on=measured_on)


@pytest.mark.parametrize(
    "name, content, message",
    (
        ("a.yaml", "sampling: {steps: 3}\nsampling: {shift: 3.0}", "line 2, column 1: the key 'sampling' stands twice"),
        ("a.json", '{"settings": {"prompt": "a", "prompt": "b"}}', "the key 'prompt' stands twice in one object"),
        ("a.yaml", "lora: " + "[" * 5000, "nested more than 100 deep"),
        ("a.json", '{"settings":' * 100_000, "nested more than 100 deep"),
        ("a.yaml", "lora: &a [*a]", "it contains itself"),
        ("a.yaml", "- &a [x, x, x]\n" + "- [" + "*a," * 10_000 + "]", "stands for more than 30000 values"),
        ("a.yaml", f"- &a {'x' * 500_000}\n" + "- *a\n" * 100, "stands for more than 30000 values"),
        ("a.yaml", "prompt: a\n" * 200_000, "larger than 512 KiB"),
        ("a.yaml", "video: {fps: 0x" + "f" * 5000 + "}", "a number of 5002 digits"),
        ("a.yaml", "sampling: {shift: .nan}", "'.nan' is not a finite number"),
        ("a.json", '{"settings": {"sampling": {"shift": NaN}}}', "NaN is not a finite number"),
        ("a.yaml", "prompt: !!python/name:os.system", "is not a type that is read"),
        ("a.yaml", "video: {fps: !!int ''}", "a value is not of its type"),
        ("a.yaml", "prompt: a\x1b[2J", "special characters are not allowed"),
    ),
)
def test_files_that_are_damaged_or_made_to_harm(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_settings(tmp_path / name)
    assert str(error.value).isprintable() and len(str(error.value)) < 2100


def test_a_byte_order_mark_is_no_part_of_the_settings(tmp_path):
    for name, content in (("a.yaml", "prompt: a cat"), ("a.json", '{"settings": {"prompt": "a cat"}}')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert read_settings(tmp_path / name) == {"prompt": "a cat"}


def test_a_key_replaces_one_that_is_merged(tmp_path):
    text = "attention: {tile: [1, 8, 8]}\nsampling: &own {<<: &all {steps: 3, shift: 2.0}, steps: 4}\n"
    (tmp_path / "a.yaml").write_text("video: {fps: 8}\n" + text)
    assert read_settings(tmp_path / "a.yaml")["sampling"] == {"steps": 4, "shift": 2.0}
    assert parse_yaml("a: {b: &c {<<: &d {x: 1}, x: 2}}\ne: {<<: *c}") == {"a": {"b": {"x": 2}}, "e": {"x": 2}}


def test_dates_are_texts_so_that_a_record_can_hold_them(tmp_path):
    (tmp_path / "a.yaml").write_text("cache: {kind: mag, ratios: [1, 1], measured_on: {when: 2026-01-01}}")
    assert resolve(read_settings(tmp_path / "a.yaml"), ROOM).cache.measured_on == {"when": "2026-01-01"}


@pytest.mark.parametrize("percent", (10, 20))
def test_sparse_configs_keep_that_share_of_the_base_model(percent):
    settings = resolve(read_settings(f"sparse_{percent}.yaml"), {"prompt": "a cat"})
    attention, dense = settings.attention, resolve(read_settings("full.yaml"), {"prompt": "a cat"})
    assert attention.algorithm == f"keep-{percent / 100}_pool-1-4-4"
    assert attention.dense_layers == (0,) and attention.dense_step_count(50) == 13
    assert (settings.checkpoint, settings.sampling, settings.video) == (dense.checkpoint, dense.sampling, dense.video)


def test_every_config_file_loads_and_runs_what_its_name_says():
    others = ("turbo", "fast", "sparse", "kandinsky5", "wan21", "wan22")
    files = [file for file in sorted(CONFIG_FOLDER.glob("*.yaml")) if not file.stem.startswith(others)]
    assert len(files) >= 7
    for file in files:
        settings = resolve(read_settings(file.name), {"prompt": "a cat"})
        name = "dense" if file.stem == "full" else file.stem.replace("nabla_", "nabla-").replace("sta_", "sta-")
        head, _, window = name.partition("sta-")
        assert settings.attention.algorithm == head + ("sta-" + window.replace("_", "-") if window else "")
        assert settings.attention.dense_steps == (12 if file.stem == "sta_18_3_3" else 0)
        tuned = settings.checkpoint.removeprefix("ai-forever/Wan2.1-T2V-14B-")
        if settings.checkpoint.startswith("ai-forever/"):
            assert tuned.lower().replace("-sta-", "_sta-") == settings.attention.algorithm
        else:
            assert settings.checkpoint == "Wan-AI/Wan2.1-T2V-14B"


@pytest.mark.parametrize("file", sorted(CONFIG_FOLDER.glob("kandinsky5_*.yaml")), ids=lambda file: file.stem)
def test_configs_of_kandinsky_run_what_their_names_say(file):
    settings = resolve(read_settings(file.name), {"prompt": "a cat"})
    size, *named = file.stem.removeprefix("kandinsky5_").split("_")
    task = "i2v" if "i2v" in named else "t2v"
    training = next((one for one in named if one in ("pretrain", "nocfg", "distilled16steps")), "sft")
    seconds = next(int(one[:-1]) for one in named if one in ("5s", "10s"))
    hub = f"kandinskylab/Kandinsky-5.0-{task.upper()}-{size.title()}-{training}-{seconds}s"
    # That of Lite from a picture alone leaves out its training.
    assert settings.checkpoint.removesuffix("-Diffusers") == hub.replace("I2V-Lite-sft-5s", "I2V-Lite-5s")
    assert settings.model.kind == f"kandinsky5-{size}-{task}"
    thresholds = {("lite", 10, False): 0.9, ("pro", 10, False): 0.9, ("pro", 5, True): 0.8, ("pro", 10, True): 0.7}
    threshold = thresholds.get((size, seconds, "hd" in named))
    assert settings.attention.algorithm == ("dense" if threshold is None else f"nabla-{threshold}_sta-11-3-3")
    sampling, unguided = settings.sampling, training in ("nocfg", "distilled16steps")
    assert (sampling.solver, sampling.shift, sampling.guide_scale) == ("euler", 5, 1 if unguided else 5)
    assert sampling.steps == (16 if training == "distilled16steps" else 50)
    video = settings.video
    assert (video.frame_num, video.fps) == (24 * seconds + 1, 24)
    assert video.size == ((1280, 768) if "hd" in named else (768, 512))


def test_ratios_that_come_with_the_program_are_of_the_configs_of_their_names():
    files = sorted((CONFIG_FOLDER / "magcache").glob("*.json"))
    for file in files:
        cache = {"cache": f"mag:0.12:{file.name}"}
        settings = resolve(cache, read_settings(f"{file.stem}.yaml"), {"prompt": "a cat"})
        assert measured_otherwise(settings) is None
        assert f"--cache mag:0.12:{file.name}" in (CONFIG_FOLDER / f"{file.stem}.yaml").read_text().replace("\n# ", " ")


def test_the_preset_that_stacks_keeps_fifty_guided_steps():
    settings = resolve(read_settings("fast.yaml"), {"prompt": "a cat"})
    assert settings.attention.algorithm == "nabla-0.7" and settings.checkpoint.endswith("NABLA-0.7")
    assert settings.fp8 and settings.cache == CacheSettings("first_block", 0.05)
    assert settings.sampling == resolve(ROOM).sampling
    assert resolve({"cache": "none"}, read_settings("fast.yaml"), {"prompt": "a cat"}).cache is None


def test_presets_for_distilled_weights_take_few_steps_without_guidance():
    for name, steps in (("turbo.yaml", 4), ("turbo_8.yaml", 8)):
        settings = resolve({"lora": ["fast.safetensors:0.5"]}, read_settings(name), {"prompt": "a cat"})
        assert (settings.sampling.steps, settings.sampling.guide_scale) == (steps, 1)
        assert settings.attention.algorithm == "nabla-0.7" and settings.checkpoint.endswith("NABLA-0.7")
    # At these the four-step weights were distilled.
    sampling = resolve(read_settings("turbo.yaml"), {"prompt": "a cat"}).sampling
    timesteps = make_solver(sampling.solver, sampling.steps, sampling.shift, "cpu").timesteps
    assert timesteps.tolist() == pytest.approx([1000, 937.5, 833.3, 625], abs=1.5)


def test_precedence_flag_yaml_checkpoint_program():
    flag = {"attention": {"algorithm": "sta-3-3-3"}, "sampling": {"steps": 4}}
    yaml = {
        "attention": {"algorithm": "nabla", "threshold": 0.5, "dense_layers": [0]},
        "sampling": {"steps": 5, "shift": 3.0},
    }
    checkpoint = {"attention": {"algorithm": "nabla-0.9"}, "sampling": {"steps": 6, "shift": 4.0, "guide_scale": 2.0}}
    settings = resolve(flag, yaml, checkpoint, ROOM)
    assert settings.attention == NablaConfig(window=(3, 3, 3), dense_layers=(0,), dense_steps=STA_DENSE_STEPS)
    sampling = settings.sampling
    assert (sampling.steps, sampling.shift, sampling.guide_scale, sampling.solver) == (4, 3.0, 2.0, "unipc")
    assert (
        resolve({"attention": {"algorithm": "nabla-0.4"}}, read_settings("sta_18_3_3.yaml"), ROOM).attention.dense_steps
        == 0
    )
    over_steps = {"attention": {"algorithm": "nabla-0.9", "dense_steps": 2, "mask_refresh": 3}}
    assert resolve({"attention": {"backend": "flex"}}, over_steps, ROOM).attention == NablaConfig(
        threshold=0.9, dense_steps=2, mask_refresh=3, backend="flex"
    )
    # Another algorithm has its own first steps and refreshes its own masks; a window alone has none to refresh.
    for algorithm in ("nabla-0.4", "keep-0.2", "nabla-0.4_sta-3-3-3", "dense"):
        other = {"algorithm": algorithm}
        assert resolve({"attention": other}, over_steps, ROOM).attention == NablaConfig.parse(algorithm)
    other = {"attention": {"algorithm": "keep-0.2", "mask_refresh": 2}}
    assert resolve(other, over_steps, ROOM).attention == NablaConfig(keep=0.2, mask_refresh=2)
    assert resolve(yaml, checkpoint, ROOM).attention == NablaConfig(threshold=0.5, dense_layers=(0,))
    assert resolve(checkpoint, ROOM).attention == NablaConfig(threshold=0.9)
    assert resolve(ROOM).attention == NablaConfig()


def test_a_window_alone_runs_its_first_steps_dense_unless_told_otherwise():
    assert resolve(ROOM | {"attention": {"algorithm": "sta-3-3-3"}}).attention.dense_steps == STA_DENSE_STEPS
    assert resolve(ROOM | {"attention": {"algorithm": "sta-3-3-3", "dense_steps": 0}}).attention.dense_steps == 0


LONG = "nabla-0.7_min-0.05_max-0.3_pool-1-2-2_dropped-mean_sta-1-3-3"


@pytest.mark.parametrize("algorithm", ("dense", "nabla-0.7", "sta-3-3-3", "keep-0.2_sta-1-3-3", LONG))
def test_settings_survive_the_json_beside_a_video(tmp_path, algorithm):
    settings = resolve(ROOM | {"attention": {"algorithm": algorithm, "tile": [1, 4, 4]}, "sampling": {"seed": 7}})
    path = tmp_path / "video.json"
    path.write_text(json.dumps({"settings": settings.to_dict(), "made_with": {}}))
    again = resolve(read_settings(str(path)), {"attention": {"algorithm": "nabla-0.1"}})
    assert isinstance(again, Settings) and again == settings


@pytest.mark.parametrize(
    "choice", ({"algorithm": "nabla-0.7"}, {"algorithm": "nabla", "threshold": 0.7}, {"threshold": 0.7})
)
def test_an_algorithm_of_numbers_or_of_a_name_refreshes_its_masks(choice):
    assert NablaConfig.from_dict(choice | {"mask_refresh": 2}) == NablaConfig(threshold=0.7, mask_refresh=2)
    for algorithm in ("dense", "sta-3-3-3"):
        with pytest.raises(InputError, match="mask_refresh 2 has no use for"):
            NablaConfig.from_dict({"algorithm": algorithm, "mask_refresh": 2})


def test_masks_that_are_kept_for_steps_survive_the_json_beside_a_video():
    settings = resolve(ROOM | {"attention": {"algorithm": "nabla-0.7", "mask_refresh": 2}})
    assert settings.attention.mask_refresh == 2 and resolve(settings.to_dict()) == settings
    # No cache is none, whatever a checkpoint says.
    assert resolve(settings.to_dict(), {"cache": "first_block"}).cache is None


def test_config_files_are_found_from_anywhere_and_paths_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_settings("nabla_0.7.yaml")["attention"]["threshold"] == 0.7
    (tmp_path / "mine.yaml").write_text("sampling: {steps: 3}\n")
    assert read_settings("mine.yaml") == read_settings(os.fspath(tmp_path / "mine.yaml")) == {"sampling": {"steps": 3}}


@pytest.mark.parametrize("content", ("a: [1", "- a list", "\t:", "just text"))
def test_files_that_are_no_settings(tmp_path, content):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match="bad.yaml"):
        read_settings(str(path))
    with pytest.raises(InputError, match="neither a file nor one of fast.yaml, full.yaml"):
        read_settings("none.yaml")
