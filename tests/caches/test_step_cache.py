"""Step caches: exact where nothing is reused, each guidance branch and video by itself, compiled, beside kept masks."""

from __future__ import annotations

import gc
import itertools
import json
import runpy
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from places import ROOT
from torch._dynamo.testing import CompileCounter

import generate
import wan
from nabla import InputError, NablaConfig
from wan.caches.apply import apply_cache, remove_cache
from wan.caches.calibration import calibrated
from wan.caches.first_block import FirstBlockCache
from wan.config.cache_settings import CacheSettings
from wan.config.settings import resolve
from wan.models.wan.processor import TRANSFORMER
from wan.run.ratios import measured_otherwise

SPARSE = NablaConfig(threshold=0.4, pool=(1, 4, 4))
RATIOS = (1.0, 1.1, 0.95, 1.05, 0.98, 1.02)
# Reuses whatever the limits let it.
LOOSE = {"first_block": 1e6, "mag": 1e6}
KINDS = tuple(LOOSE)


def settings(kind: str, threshold: float, **changes) -> CacheSettings:
    return CacheSettings(kind, threshold, ratios=RATIOS if kind == "mag" else None, **changes)


def loose(kind: str) -> CacheSettings:
    return settings(kind, LOOSE[kind]) if kind in LOOSE else CacheSettings(kind)


@pytest.fixture(scope="module")
def pipe(nano):
    return wan.WanT2V.from_pretrained(nano, SPARSE)


@pytest.fixture(autouse=True)
def as_loaded(pipe):
    yield
    remove_cache(pipe.transformer)
    wan.apply_attention(pipe.transformer, SPARSE)


def sample(pipe, seed: int = 0, steps: int = 6, **changes) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 16, 2, 16, 16, generator=generator)
    texts = torch.randn(2, 7, pipe.transformer.config.text_dim, generator=generator).split(1)
    return pipe.sample(*texts, noise=noise, steps=steps, **changes)


class Twin(torch.nn.Module):
    """All blocks as one, which in some steps adds what those after the first few added last, in that guidance branch.

    The obvious way to do what the caches do, given which steps reuse: the forwards of a step are told by their order.
    """

    def __init__(self, blocks: torch.nn.ModuleList, first: int, reuses: set[int], begins: int = 0):
        super().__init__()
        self.blocks, self.first, self.reuses, self.begins = blocks, first, reuses, begins
        self.calls, self.ran, self.kept = 0, True, {}

    def forward(self, hidden: torch.Tensor, *others) -> torch.Tensor:
        step, branch = divmod(self.calls, 2)
        self.calls, self.ran = self.calls + 1, self.begins + step not in self.reuses
        for block in self.blocks[: self.first]:
            hidden = block(hidden, *others)
        if not self.ran:
            return hidden + self.kept[branch]
        before = hidden
        for block in self.blocks[self.first :]:
            hidden = block(hidden, *others)
        self.kept[branch] = hidden - before
        return hidden


def sample_by_twin(pipe, kind: str, reuses: set[int], begins: tuple[int, ...] = (0,), **changes) -> torch.Tensor:
    """begins: the first step of each transformer"""
    originals = [one.blocks for one in pipe.transformers]
    for one, begin in zip(pipe.transformers, begins):
        one.blocks = torch.nn.ModuleList([Twin(one.blocks, 1 if kind == "first_block" else 0, reuses, begin)])
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("wan.attention.apply.ran_in_full", lambda transformer, *_: transformer.blocks[0].ran)
            return sample(pipe, **changes)
    finally:
        for one, blocks in zip(pipe.transformers, originals):
            one.blocks = blocks


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_reused_at_threshold_0(pipe, kind):
    plain = sample(pipe)
    cache = apply_cache(pipe.transformer, settings(kind, 0, warmup=0), TRANSFORMER)
    assert torch.equal(sample(pipe), plain) and (cache.forwards, cache.reused) == (12, 0)
    remove_cache(pipe.transformer)
    assert torch.equal(sample(pipe), plain) and pipe.cache is None


@pytest.mark.parametrize(
    "changes, dense_steps, reuses",
    (
        (dict(max_skips=2), 0, {1, 2, 4, 5}),
        (dict(max_skips=2, warmup=0.5), 0, {3, 4}),
        (dict(max_skips=9, warmup=0), 3, {3, 4, 5}),
        (dict(max_skips=0), 0, set()),
        (dict(warmup=1), 0, set()),
    ),
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_reused_is_what_the_branch_computed_last(pipe, kind, changes, dense_steps, reuses):
    wan.apply_attention(pipe.transformer, replace(SPARSE, dense_steps=dense_steps))
    exact, plain = sample_by_twin(pipe, kind, reuses), sample(pipe)
    cache = apply_cache(pipe.transformer, settings(kind, LOOSE[kind], **changes), TRANSFORMER)
    reused = sample(pipe)
    assert torch.equal(reused, exact) and cache.reused == 2 * len(reuses)
    assert bool(reuses) != torch.equal(reused, plain)


@pytest.mark.parametrize("kind", (*KINDS, "taylorseer"))
def test_a_cache_that_is_taken_off_keeps_nothing(pipe, kind):
    cache = apply_cache(pipe.transformer, loose(kind), TRANSFORMER)
    cache.begin(6, dense_steps=0)
    inputs = torch.randn(1, 16, 2, 16, 16), torch.tensor([500]), torch.randn(1, 7, pipe.transformer.config.text_dim)
    with cache.branch("cond", 0):
        pipe.transformer(*inputs)
    leader = pipe.transformer.blocks[0]._diffusers_hook.get_hook(cache.hook)
    state = weakref.ref(leader.state_manager._state_cache["cond"])
    gc.disable()
    try:
        remove_cache(pipe.transformer)
        assert state() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("refresh", (2, 3, 4))
def test_masks_are_kept_from_forwards_that_ran_alone(pipe, kind, refresh):
    wan.apply_attention(pipe.transformer, replace(SPARSE, mask_refresh=refresh))
    # With masks kept for 2 steps, step 2 would choose them anew, and leaves that to step 3.
    exact = sample_by_twin(pipe, kind, {1, 2, 4, 5})
    apply_cache(pipe.transformer, settings(kind, LOOSE[kind], max_skips=2), TRANSFORMER)
    assert torch.equal(sample(pipe), exact)


def test_the_first_block_decides_by_its_relative_change(pipe, monkeypatch):
    additions, ran = [], []
    computes = FirstBlockCache.computes
    watched = staticmethod(lambda first: ran.append(computes(first)) or ran[-1])
    monkeypatch.setattr(FirstBlockCache, "computes", watched)
    see = pipe.transformer.blocks[0].register_forward_hook(lambda _, args, out: additions.append(out - args[0]))
    sample(pipe, guide_scale=1.0)
    see.remove()
    change = [((b - a).abs().mean() / a.abs().mean()).item() for a, b in zip(additions, additions[1:])]
    for factor, reuses in ((1.001, True), (0.999, False)):
        apply_cache(
            pipe.transformer,
            settings("first_block", factor * change[0], warmup=0),
            TRANSFORMER,
        )
        ran.clear()
        sample(pipe, guide_scale=1.0)
        assert ran[:2] == [True, not reuses]


def test_mag_decides_by_the_error_that_ratios_predict(pipe):
    # Ratios of 0.9 and 0.9 predict errors of 0.1 and then 0.19 more.
    for threshold, reuses in ((0.09, set()), (0.2, {1, 3, 5}), (0.3, {1, 2, 4, 5})):
        cache = apply_cache(
            pipe.transformer,
            CacheSettings("mag", threshold, warmup=0, ratios=(0.9,) * 6),
            TRANSFORMER,
        )
        sample(pipe, guide_scale=1.0)
        assert cache.reused == len(reuses)


@pytest.mark.parametrize(
    "interval, warmup, dense_steps, computed",
    (
        (2, 0.34, 0, {0, 1, 3, 5}),
        (3, 0.34, 0, {0, 1, 3}),
        (2, 0, 3, {0, 1, 2, 4}),
        (9, 0, 0, {0, 2}),
        (2, 1, 0, set(range(6))),
    ),
)
@pytest.mark.parametrize("refresh", (1, 3))
def test_taylorseer_goes_on_along_a_line_in_each_branch(pipe, interval, warmup, dense_steps, computed, refresh):
    wan.apply_attention(pipe.transformer, replace(SPARSE, dense_steps=dense_steps, mask_refresh=refresh))
    exact = sample_along_a_line(pipe, computed)
    cache = apply_cache(
        pipe.transformer,
        CacheSettings("taylorseer", interval=interval, warmup=warmup),
        TRANSFORMER,
    )
    torch.testing.assert_close(sample(pipe), exact, rtol=0, atol=1e-5)
    assert (cache.forwards, cache.reused) == (12, 12 - 2 * len(computed))


def sample_along_a_line(pipe, computed: set[int]) -> torch.Tensor:
    """With forwards in some steps, and between them what the last two of the branch had, carried on."""
    full, known, calls, ran = pipe.transformer.forward, {0: [], 1: []}, itertools.count(), []

    def forward(*args, **others):
        step, branch = divmod(next(calls), 2)
        points = known[branch]
        ran.append(step in computed)
        if ran[-1]:
            points.append((step, full(*args, **others)[0]))
            return points[-1][1:]
        (last, value), (before, earlier) = points[-1], points[-2] if len(points) > 1 else (-1, points[-1][1])
        return (value + (value - earlier) / (last - before) * (step - last),)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.transformer, "forward", forward)
        patch.setattr("wan.attention.apply.ran_in_full", lambda *_: ran[-1])
        return sample(pipe)


@pytest.mark.parametrize("kind", (*KINDS, "taylorseer"))
def test_a_video_owes_nothing_to_the_one_before_even_if_that_was_cut_off(pipe, kind):
    cache = apply_cache(pipe.transformer, loose(kind), TRANSFORMER)
    first = sample(pipe)
    sample(pipe, seed=1, steps=4)
    assert torch.equal(sample(pipe), first)
    reused = cache.reused
    fail = pipe.transformer.blocks[-1].register_forward_pre_hook(lambda *_: 1 / 0 if cache.forwards == 5 else None)
    with pytest.raises(ZeroDivisionError):
        sample(pipe, seed=2)
    fail.remove()
    assert torch.equal(sample(pipe), first) and cache.reused == reused > 0
    states = [block._diffusers_hook.hooks.values() for block in pipe.transformer.blocks]
    assert not any(hook.state_manager._state_cache for hooks in states for hook in hooks)


def test_guidance_runs_branch_by_branch_whatever_room_there_is(pipe, monkeypatch):
    apply_cache(pipe.transformer, settings("first_block", LOOSE["first_block"]), TRANSFORMER)
    apart = sample(pipe)
    monkeypatch.setattr(wan.models.wan.memory, "has_room_for_both", lambda *_: True)
    assert torch.equal(sample(pipe), apart)


@pytest.mark.parametrize("kind", (*KINDS, "taylorseer"))
def test_compiled_blocks_stay_one_graph(nano, kind):
    pipe = wan.WanT2V.from_pretrained(nano, SPARSE)
    plain, counter = sample(pipe), CompileCounter()
    for block in pipe.transformer.blocks:
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True, dynamic=False)
    apply_cache(
        pipe.transformer,
        settings(kind, 0) if kind in LOOSE else CacheSettings(kind, warmup=1),
        TRANSFORMER,
    )
    assert torch.equal(sample(pipe), plain) and counter.frame_count == 1
    cache = apply_cache(pipe.transformer, loose(kind), TRANSFORMER)
    sample(pipe)
    assert counter.frame_count == 1 and cache.reused > 0


def test_caches_of_diffusers_that_somebody_put_on(pipe):
    """Known ones go with kept masks, others are refused, since what they leave out is not known."""
    transformer = pipe.transformer
    wan.apply_attention(transformer, replace(SPARSE, mask_refresh=4))
    inputs = torch.randn(1, 16, 2, 16, 16), torch.randn(1, 7, transformer.config.text_dim)

    def forward(timestep: float) -> bool:
        with torch.no_grad(), transformer.cache_context("cond"):
            transformer(inputs[0], torch.tensor([timestep]), inputs[1])
        return transformer.nabla.masks.chosen is not None

    transformer.enable_cache(FirstBlockCacheConfig(1e6))
    assert [forward(timestep) for timestep in (900.0, 950.0, 940.0)] == [True, False, False]
    transformer._reset_stateful_cache()
    assert forward(930.0)
    transformer.disable_cache()
    transformer.enable_cache(PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: 500))
    with pytest.raises(InputError, match="PyramidAttentionBroadcastConfig does not say which blocks it leaves out"):
        forward(990.0)
    transformer.disable_cache()


def test_ratios_are_the_growth_of_what_all_blocks_add(pipe):
    inputs, outputs = [], []
    hooks = [
        pipe.transformer.blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0])),
        pipe.transformer.blocks[-1].register_forward_hook(lambda *seen: outputs.append(seen[-1])),
    ]
    with calibrated([pipe.transformer], TRANSFORMER) as calibration:
        for seed in (0, 1):
            sample(pipe, seed, steps=3)
    for hook in hooks:
        hook.remove()
    norms = torch.stack([(out - x).norm(dim=-1) for x, out in zip(inputs, outputs)]).unflatten(0, (2, 3, 2))
    ratios = torch.tensor(calibration.ratios())
    assert ratios[0] == 1 and pipe.cache is None
    torch.testing.assert_close(ratios[1:], (norms[:, 1:] / norms[:, :-1]).flatten(3).mean((0, 2, 3)))


@pytest.fixture
def calibrate(random_nano, tmp_path, monkeypatch):
    """scripts/calibrate_cache.py: `calibrate(*flags)` -> (exit code, the file that it writes)."""
    script = Path(generate.__file__).parent / "scripts" / "calibrate_cache.py"

    def calibrate(*flags):
        files = ["--prompt_file", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "ratios.json")]
        monkeypatch.setattr(
            sys, "argv", [str(script), "--ckpt_dir", str(random_nano), "--device", "cpu", *files, *flags]
        )
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
        return ended.value.code, tmp_path / "ratios.json"

    return calibrate


def test_ratios_are_measured_as_flags_config_and_lines_of_prompts_say(calibrate, tmp_path, capsys):
    line = {"prompt": "A cat", "seed": 7, "size": "48*32", "frame_num": 1, "negative_prompt": "a dog"}
    (tmp_path / "prompts.txt").write_text("A red circle\n" + json.dumps(line))
    (tmp_path / "own.yaml").write_text("sampling: {steps: 3, shift: 3.0}")
    walk = "--size 32*32 --frame_num 5 --sample_solver dpm++ --sample_guide_scale 2 --sample_steps 2"
    code, file = calibrate("--config", str(tmp_path / "own.yaml"), *walk.split())
    assert code == 0, capsys.readouterr().err
    made = json.loads(file.read_text())
    assert len(made["ratios"]) == 2
    wanted = {"checkpoint": "nano", "solver": "dpm++", "steps": 2, "shift": 3.0, "guide_scale": 2}
    assert wanted.items() <= made["measured_on"].items()
    first, second = made["videos"]
    assert (first["seed"], first["size"], first["frame_num"]) == (0, [32, 32], 5)
    assert second == line | {"size": [48, 32]}
    for flag in ("--log_file=run.jsonl", "--cache=mag"):
        assert calibrate(flag)[0] == 2
        assert f"{flag.partition('=')[0]} is not for measuring ratios" in capsys.readouterr().err


def test_ratios_measured_otherwise_are_said_in_one_line():
    measured_on = {"checkpoint": "x", "solver": "unipc", "steps": 50, "shift": 5.0, "lora": [], "guide_scale": 5.0}
    cache = {"kind": "mag", "ratios": [1.0, 1.1], "measured_on": measured_on}
    alike = resolve({"checkpoint": "/here/x", "prompt": "a cat", "cache": cache})
    assert measured_otherwise(alike) is None and resolve(alike.to_dict()) == alike
    walk = {"solver": "dpm++", "steps": 20, "shift": 3.0}
    assert measured_otherwise(resolve({"checkpoint": "y", "prompt": "a cat", "cache": cache, "sampling": walk})) == (
        "the cache's ratios were measured with checkpoint x, solver unipc, steps 50, shift 5.0, and this runs with "
        "checkpoint y, solver dpm++, steps 20, shift 3.0; scripts/calibrate_cache.py measures others"
    )
    unknown = cache | {"measured_on": None}
    assert measured_otherwise(resolve({"checkpoint": "y", "prompt": "a cat", "cache": unknown})) is None


def test_the_script_measures_ratios_that_mag_takes(calibrate, random_nano, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("A red circle\nA cat")
    small = "--size 64*48 --frame_num 5 --device cpu --sparse_algo nabla-0.5".split()
    code, ratios = calibrate(*small, "--steps", "4")
    assert code == 0, capsys.readouterr().err
    made = json.loads(ratios.read_text())
    assert len(made["ratios"]) == 4 and made["measured_on"]["attention"] == "nabla-0.5"
    flags = [*small, "--prompt", "A cat", "--ckpt_dir", str(random_nano), "--sample_steps", "5", "--base_seed", "1"]
    out = tmp_path / "cat.mp4"
    assert generate.main([*flags, "--cache", f"mag:1000:{ratios}", "--save_file", str(out)]) == 0
    said = capsys.readouterr().err
    assert "cache: mag, threshold 1000.0, 6 of 10 forwards reused" in said
    assert "warning: the cache's ratios were measured with steps 4, and this runs with steps 5; scripts/cal" in said
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["settings"]["cache"]["ratios"] == made["ratios"]
    assert record["made_with"]["cache"] == {"forwards": 10, "reused": 6}
    again = tmp_path / "again.mp4"
    assert generate.main(["--config", str(out.with_suffix(".json")), "--save_file", str(again)]) == 0
    assert again.read_bytes() == out.read_bytes()


def test_flags_beat_the_config_and_none_switches_off():
    own = {"checkpoint": "x", "prompt": "a cat"}
    lower = own | {"cache": {"kind": "first_block", "threshold": 0.1}}
    assert resolve(lower).cache == CacheSettings("first_block", 0.1)
    assert resolve({"cache": "first_block"}, lower).cache == CacheSettings("first_block", 0.05)
    assert resolve({"cache": "taylorseer:3"}, lower).cache == CacheSettings("taylorseer", interval=3)
    assert resolve({"cache": "none"}, lower).cache is None and resolve({"cache": False}, lower).cache is None
    assert resolve(own).cache is None
    again = resolve(resolve(lower).to_dict())
    assert again == resolve(lower)


@pytest.mark.parametrize(
    "given, message",
    (
        ("first-block", "cache 'first-block' is not known; use one of none, first_block, mag, taylorseer"),
        ("taylorseer:1", "cache interval 1 is not a whole number of steps from 2"),
        ("taylorseer:2.5", "cache interval 2.5 is not a whole number of steps from 2"),
        ("taylorseer:2:ratios.json", "cannot be read"),
        ({"kind": "taylorseer", "threshold": 0.1}, "cache taylorseer has no use for threshold 0.1; leave it out"),
        ({"kind": "mag", "interval": 2}, "cache mag has no use for interval 2; leave it out"),
        ("first_block:much", "'much' is not a number"),
        ("first_block:-1", "cache threshold -1.0 is not a number of at least 0"),
        ("first_block:nan", "cache threshold nan is not a number"),
        ("mag", "cache mag needs the ratios of the checkpoint; measure them with scripts/calibrate_cache.py"),
        ("mag:0.1:/nowhere.json", "cache ratios /nowhere.json cannot be read"),
        ({"kind": "first_block", "ratios": [1.0]}, "cache first_block has no use for ratios"),
        ({"kind": "mag", "ratios": [1.0], "measured_on": 1}, "cache measured_on 1 is not a mapping"),
        ({"kind": "mag", "ratios": [1.0, 0.0]}, "are not positive numbers, one a step"),
        ({"kind": "first_block", "max_skips": 1.5}, "cache max_skips 1.5 is not a whole number"),
        ({"kind": "first_block", "warmup": 2}, "cache warmup 2 is not a share of the steps"),
        ({"kind": "first_block", "steps": 2}, "cache has an unknown key 'steps'"),
        ({"threshold": 0.1}, "cache None is not known"),
        (["first_block"], "is neither none, nor kind:threshold, nor a mapping"),
    ),
)
def test_bad_settings_are_one_line(given, message):
    with pytest.raises(InputError, match=message.replace("(", "[(]")) as error:
        CacheSettings.parse(given)
    assert "\n" not in str(error.value)


def test_private_names_of_diffusers_are_imported_for_runs_with_a_cache_alone():
    code = "import sys, wan\nwan.WanT2V, wan.apply_attention\nprint(*(m for m in sys.modules if 'caches' in m))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "wan.caches.ran" in said and not {"wan.caches.apply", "wan.caches.base"} & set(said.split())
