"""What a recorder says of a generation: against masks chosen anew, in its log, in its report, and nothing when off."""

from __future__ import annotations

import importlib.util
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from places import PROGRAMS
from starting import finish, fork
from torch._dynamo.testing import CompileCounter

import generate
import nabla
import wan.attention.layer
from nabla import InputError, KeepProfile, NablaConfig, Stretch, probe
from nabla.backends import flex
from nabla.block_lists import from_lists, to_lists
from nabla.rotary import rotate
from wan import Observer, Recorder, WanT2V
from wan.caches.apply import apply_cache, remove_cache
from wan.config.cache_settings import CacheSettings
from wan.models.wan import memory, random_checkpoint
from wan.models.wan.processor import TRANSFORMER
from wan.observe import events
from wan.observe.progress import ProgressLine
from wan.observe.report import draw_report
from wan.observe.report_data import report_data
from wan.observe.report_figure import figure_of
from wan.observe.run_log import RunLog, read_log

SIZE = 2, 18, 44
NABLA = NablaConfig(threshold=0.4)
CONFIGS = {
    "dense": NablaConfig(),
    "nabla": NABLA,
    "nabla and window": replace(NABLA, window=(1, 1, 3)),
    "window alone": NablaConfig(window=(1, 1, 3)),
    "a step and a layer dense": replace(NABLA, dense_steps=1, dense_layers=(1,)),
    "masks kept": replace(NABLA, mask_refresh=2),
    # Of three steps the last alone keeps other shares; each stretch has a layer that runs dense.
    "a profile": NablaConfig(profile=KeepProfile((Stretch(0.5, (1.0, 0.3, 0.6)), Stretch(1.0, (0.3, 0.5, 1.0))))),
}


@pytest.fixture(scope="module")
def pipe(nano):
    return WanT2V.from_pretrained(nano)


def sample(pipe, observer, guide_scale=5.0, steps=3):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 16, *SIZE, generator=generator)
    texts = torch.randn(2, 7, pipe.transformer.config.text_dim, generator=generator).split(1)
    return pipe.sample(*texts, noise=noise, steps=steps, guide_scale=guide_scale, observer=observer)


def kinds(records, kind):
    return [record for record in records if record["kind"] == kind]


def test_time_left_is_of_recent_steps_and_not_of_the_first(capsys):
    line = ProgressLine(10)
    # The first compiles, the third is left out by a cache.
    for seconds in (30.0, 10.0, 0.0, 10.0):
        line.step(seconds, None)
    line.close()
    said = capsys.readouterr().err.split("\r")[-1]
    assert "step 4 of 10, 10.00 s a step, 00:40 left" in said


@pytest.fixture
def chosen_anew(monkeypatch):
    """The blocks of each sparse attention as `select_blocks` chooses them, in order: each (B, heads, N, N)."""
    masks, attend = [], nabla.attend

    def attend_and_choose(q, k, v, plan, rotary, kept, share):
        if kept is not None and kept.reuse:
            masks.append(kept.mask.clone())
        elif plan.selection is not None:
            masks.append(nabla.select_blocks(rotate(q, rotary), rotate(k, rotary), plan.grid, plan.config))
        return attend(q, k, v, plan, rotary, kept, share)

    monkeypatch.setattr(wan.attention.layer.nabla, "attend", attend_and_choose)
    return masks


@pytest.mark.parametrize("guidance", ("none", "two passes", "one batch"))
@pytest.mark.parametrize("name", CONFIGS)
def test_shares_and_examples_are_those_of_masks_chosen_anew(name, guidance, pipe, chosen_anew, monkeypatch):
    config = CONFIGS[name]
    monkeypatch.setattr(memory, "has_room_for_both", lambda *_: guidance == "one batch")
    wan.apply_attention(pipe.transformer, config)
    recorder = Recorder(examples=True)
    sample(pipe, recorder, guide_scale=1.0 if guidance == "none" else 5.0)
    layers, masks = len(pipe.transformer.blocks), iter(chosen_anew)
    forwards = 2 if guidance == "two passes" or (guidance == "one batch" and config.mask_refresh > 1) else 1
    assert len(kinds(recorder.records, "layer")) == 3 * layers
    last = {}
    for step in kinds(recorder.records, "step"):
        found = {layer: [] for layer in range(layers)}
        for forward in range(forwards):
            for layer in range(layers):
                if config.at(layer, layers, step["step"], 3).is_dense:
                    found[layer].append(torch.ones(pipe.transformer.config.num_attention_heads))
                    continue
                mask = next(masks)
                found[layer].append(mask.float().mean((0, 2, 3)))
                if forward == 0 and step["step"] == 2:
                    last[layer] = mask[0]
        assert step["forwards"] == forwards and step["ms"] > 0 and step["memory"]["host_peak_gib"] > 0
        of_step = [one for one in kinds(recorder.records, "layer") if one["step"] == step["step"]]
        for record in of_step:
            by_head = torch.stack(found[record["layer"]]).double().mean(0)
            wanted = {"mean": by_head.mean().item(), "min": by_head.min().item(), "max": by_head.max().item()}
            assert record["kept"] == pytest.approx(wanted, abs=2e-6)
            is_dense = bool((by_head == 1).all()) and record["kernel"] == "sdpa"
            assert record["kernel"] == ("sdpa" if is_dense else "gather") and record["block_ms"] > 0
            assert (record["attention_ms"] is None) == is_dense
            chooses = not is_dense and name != "window alone"
            assert (record["mask_ms"] is not None) == chooses
        assert step["kept"] == pytest.approx(np.mean([one["kept"]["mean"] for one in of_step]), abs=2e-6)
    assert next(masks, None) is None
    assert {example.layer for example in recorder.examples} == set(last)
    for example in recorder.examples:
        mask = last[example.layer][0 if example.head is None else example.head].numpy()
        assert (example.blocks == mask).all() and example.density == pytest.approx(mask.mean(), abs=2e-6)


@pytest.mark.parametrize("name", ("dense", "nabla", "a step and a layer dense"))
@pytest.mark.parametrize(
    "cache, ran", (("first_block:1e9", [0]), ({"kind": "mag", "threshold": 1e9, "ratios": [1]}, []))
)
def test_layers_that_a_cache_leaves_out_kept_nothing(pipe, name, cache, ran):
    wan.apply_attention(pipe.transformer, CONFIGS[name])
    apply_cache(pipe.transformer, CacheSettings.parse(cache), TRANSFORMER)
    recorder = Recorder()
    try:
        sample(pipe, recorder)
        reused = pipe.cache.reused
    finally:
        remove_cache(pipe.transformer)
    layers = len(pipe.transformer.blocks)
    kept = [
        [one["layer"] for one in kinds(recorder.records, "layer") if one["step"] == n and one["kept"]] for n in (0, 2)
    ]
    assert reused == 4 and kept == [list(range(layers)), ran]
    steps = kinds(recorder.records, "step")
    assert (steps[2]["kept"] is None) == (not ran) and [one["layers_run"] for one in steps] == [layers, *[len(ran)] * 2]
    assert recorder.records[0]["cache"].startswith(CacheSettings.parse(cache).kind)


@pytest.mark.parametrize(
    "cache, blocks, example_step",
    (
        (None, [None, "chosen", "taken over", "chosen", "taken over"], 4),
        ({"kind": "first_block", "threshold": 1e9, "warmup": 0.4}, [None, "chosen", "taken over", *["chosen"] * 2], 1),
        ({"kind": "mag", "threshold": 1e9, "warmup": 0.4, "ratios": [1]}, [None, "chosen", None, None, None], 1),
    ),
)
def test_where_blocks_came_from_and_what_is_said_of_steps_that_a_cache_cut_short(
    pipe, tmp_path, cache, blocks, example_step
):
    wan.apply_attention(pipe.transformer, replace(NABLA, dense_steps=1, mask_refresh=2))
    if cache is not None:
        apply_cache(pipe.transformer, CacheSettings.parse(cache), TRANSFORMER)
    recorder = Recorder(examples=True)
    try:
        sample(pipe, recorder, steps=5)
    finally:
        remove_cache(pipe.transformer)
    layers, steps = len(pipe.transformer.blocks), kinds(recorder.records, "step")
    assert [one["blocks"] for one in steps] == blocks
    assert {(one.step, one.layer) for one in recorder.examples} == {(example_step, layer) for layer in range(layers)}
    means = [one["kept"]["mean"] for one in kinds(recorder.records, "layer") if one["kept"]]
    assert events.stages_event({}, recorder.records)["kept"] == pytest.approx(np.mean(means), abs=2e-6)
    drawn = draw_report(recorder.records, tmp_path / "report.png", recorder.examples)
    assert drawn.complete.tolist() == [one["layers_run"] == layers for one in steps]
    heat, _, by_step, *_ = figure_of(recorder.records[0], drawn).subfigs[0].axes
    said = [text.get_text() for text in (*heat.get_legend().get_texts(), *by_step.get_legend().get_texts())]
    assert ("left out by the cache" in said) == (cache is not None)
    assert ("mean of the layers that ran" in said) == (cache is not None and cache["kind"] == "first_block")


def test_watching_changes_nothing_and_leaves_nothing(pipe, capsys):
    wan.apply_attention(pipe.transformer, NABLA)
    plain = sample(pipe, None)
    before = [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in pipe.transformer.blocks]
    assert torch.equal(sample(pipe, Recorder(examples=True, progress=True)), plain)
    said = capsys.readouterr().err
    assert "sampling |" in said and "start" not in said.split("\r")[-1]
    assert before == [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in pipe.transformer.blocks]
    assert all(layer.density is None for layer in pipe.transformer.nabla.layers) and probe._listening is None


@pytest.mark.parametrize("backend", ("reference", "gather"))
def test_compiled_blocks_stay_one_graph_while_watched(nano, backend):
    pipe, counter = WanT2V.from_pretrained(nano, replace(NABLA, backend=backend)), CompileCounter()
    for block in pipe.transformer.blocks:
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True, dynamic=False)
    recorder = Recorder(examples=True)
    for _ in range(2):
        sample(pipe, recorder)
    assert counter.frame_count == 1
    # Of what is no operator nothing can be seen in a graph, which is said and not made up.
    layers, is_seen = kinds(recorder.records, "layer"), backend == "gather"
    assert all(one["block_ms"] > 0 and one["kept"]["mean"] < 1 for one in layers)
    assert all((one["attention_ms"] is not None) == is_seen for one in layers)
    assert bool(recorder.examples) == is_seen


def test_operators_in_compiled_graphs_say_what_they_do(monkeypatch):
    """As they run in one: called as operators, outside `attend`."""

    class Listening(probe.Probe):
        def __init__(self):
            self.parts, self.seen = [], []

        def run(self, part, function, args, kwargs):
            self.parts.append(part)
            return function(*args, **kwargs)

        def see(self, counts, blocks):
            self.seen.append((counts(), blocks(torch.tensor([1, 0]))))

    monkeypatch.setattr(flex, "run", lambda args, options, sums: torch.zeros_like(args[0]))
    blocks = torch.rand(1, 2, 6, 6) > 0.5
    full = torch.arange(6) < 4
    q = torch.randn(1, 2, 6 * 64, 32)
    whole, parts = to_lists(blocks), (to_lists(blocks & full), to_lists(blocks & ~full))
    heard = Listening()
    with probe.listening(heard):
        flex.block_sparse(q, q, q, *whole, None, None, None)
        flex.block_sparse(q, q, q, *parts[0], *parts[1], torch.ones(6 * 64, dtype=torch.bool))
    assert heard.parts == [probe.ATTENTION] * 2
    for counts, chosen in heard.seen:
        assert torch.equal(counts, blocks.sum(-1)) and torch.equal(chosen, blocks[:, [1, 0]])
    assert torch.equal(from_lists(whole), blocks)


def test_the_log_is_whole_after_every_step_and_the_report_says_the_same(pipe, tmp_path):
    wan.apply_attention(pipe.transformer, replace(NABLA, window=(1, 1, 3), dense_steps=1))
    log, lines = tmp_path / "run.jsonl", []

    class Reading(Recorder):
        def step_ends(self, step, latents):
            super().step_ends(step, latents)
            lines.append(len(read_log(log)))

    recorder = Reading(log=log, examples=True)
    sample(pipe, recorder)
    layers = len(pipe.transformer.blocks)
    assert lines == [1 + (layers + 1) * step for step in (1, 2, 3)]
    logged = read_log(log)
    assert logged == recorder.records and logged[0]["attention"] == "nabla-0.4_sta-1-1-3"
    drawn = draw_report(logged, tmp_path / "report.png", recorder.examples)
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    for one in kinds(logged, "layer"):
        assert drawn.densities[one["layer"], one["step"]] == one["kept"]["mean"]
        assert drawn.dense[one["layer"], one["step"]] == (one["step"] == 0)
    assert drawn.by_step.tolist() == [one["kept"] for one in kinds(logged, "step")]
    sparse = [one["kept"] for one in kinds(logged, "layer") if one["step"] == 2]
    assert drawn.low[2] == min(one["min"] for one in sparse) and drawn.high[2] == max(one["max"] for one in sparse)
    total = sum(one["ms"] for one in kinds(logged, "step")) / 1000
    assert sum(drawn.parts.values()) == pytest.approx(total) and min(drawn.parts.values()) >= 0
    assert drawn.parts["attention"] == pytest.approx(
        sum(one["attention_ms"] or 0 for one in kinds(logged, "layer")) / 1000
    )
    assert drawn.window.mean() < 1 and all((one.blocks | ~drawn.window).all() for one in drawn.examples)
    heat = figure_of(logged[0], drawn).subfigs[0].axes[0].images[0].get_array()
    assert (heat.mask == drawn.dense).all() and (heat.data == drawn.densities).all()


def test_a_prompt_that_fonts_lack_is_drawn_without_boxes_and_whole_in_the_description(pipe, tmp_path):
    image = pytest.importorskip("PIL.Image")
    wan.apply_attention(pipe.transformer, NABLA)
    recorder = Recorder()
    sample(pipe, recorder)
    # No font has what is for private use; one that comes with matplotlib has the arrow, and the usual one has not.
    for prompt, drawn in (("a cat ⥄ $5", "a cat ⥄ $5"), ("a \U000f0000\U000f0001 cat", "a  cat (2 characters that no")):
        run, path = recorder.records[0] | {"prompt": prompt}, tmp_path / "report.png"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            numbers = draw_report([run, *recorder.records[1:]], path)
        title = figure_of(run, numbers).subfigs[0].get_suptitle()
        assert title.replace("\\$", "$").startswith(drawn)
        assert image.open(path).info["Description"] == prompt


def test_a_layer_that_does_not_run_is_null(pipe, tmp_path):
    wan.apply_attention(pipe.transformer, NABLA)
    block = pipe.transformer.blocks[1]
    own, calls = block.forward, []

    def skipped_after_the_first_step(hidden, *args):
        calls.append(1)
        return own(hidden, *args) if len(calls) <= 2 else hidden

    block.forward = skipped_after_the_first_step
    try:
        recorder = Recorder()
        sample(pipe, recorder)
    finally:
        del block.forward
    kept = [one["kept"] for one in kinds(recorder.records, "layer") if one["layer"] == 1]
    assert kept[0] is not None and kept[1:] == [None, None]
    assert np.isnan(draw_report(recorder.records, tmp_path / "report.png").densities[1]).tolist() == [False, True, True]


def test_an_observer_is_told_all_in_order_and_may_end_a_video(random_nano):
    pipe = WanT2V.from_pretrained(random_nano, NABLA)
    told = []

    class Telling(Observer):
        def stage_begins(self, name):
            told.append(name)

        def stage_ends(self, name, seconds):
            told.append(f"{name} done")

        def step_ends(self, step, latents):
            told.append((step, tuple(latents.shape)))

    class Ending(Observer):
        def step_ends(self, step, latents):
            raise KeyboardInterrupt

    small = {"size": (32, 32), "frame_num": 1, "steps": 2, "seed": 0}
    pipe.generate("a cat", **small, observer=Telling(), progress=True)
    shape = (1, 16, 1, 4, 4)
    steps = [(0, shape), (1, shape)]
    assert told == ["text", "text done", "sampling", *steps, "sampling done", "decode", "decode done"]
    with pytest.raises(KeyboardInterrupt):
        pipe.generate("a cat", **small, observer=Ending(), progress=True)
    assert all(layer.density is None for layer in pipe.transformer.nabla.layers)


@pytest.fixture
def run(random_nano, tmp_path, monkeypatch, capsys):
    """generate.py in an empty directory: `run(*flags)` -> (exit code, what it said, files it left)."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        small = "--size 64*48 --frame_num 1 --sample_steps 2 --base_seed 1 --device cpu --sparse_algo nabla-0.5".split()
        code = generate.main(["--ckpt_dir", str(random_nano), *small, *flags])
        return code, capsys.readouterr().err, sorted(path.name for path in tmp_path.iterdir())

    return run


def test_log_and_report_from_the_command_line(run):
    flags = "--prompt", "A $cat", "--save_file", "out.png", "--log_file", "run.jsonl", "--report", "report.png"
    code, said, files = run(*flags)
    assert code == 0 and files == ["out.json", "out.png", "report.png", "run.jsonl"]
    assert "step 2 of 2, kept " in said and "log: run.jsonl\nreport: report.png\n" in said
    logged = read_log("run.jsonl")
    made = json.loads(open("out.json", encoding="utf-8").read())["made_with"]["seconds"]
    assert logged[0]["prompt"] == "A $cat" and logged[-1]["kind"] == "stages" and logged[-1]["seconds"] == made


def test_each_video_of_a_prompt_file_has_its_own(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("A cat\nA dog\n")
    files = run("--prompt_file", "prompts.txt", "--log", "run.jsonl")[2]
    names = [name.removesuffix(".png") for name in files if name.endswith(".png")]
    assert [name[:-9] for name in names] == ["A-cat", "A-dog"]
    endings = (f"{name}.json" for name in names), (f"run-{name}.jsonl" for name in names)
    assert files == sorted(["prompts.txt", *(f"{name}.png" for name in names), *endings[0], *endings[1]])


def test_files_of_a_prompt_file_are_checked_before_anything_is_made(run, tmp_path):
    (tmp_path / "prompts.txt").write_text('A cat\n{"prompt": "A dog", "name": "%s"}\n' % ("x" * 240))
    code, said, files = run("--prompt_file", "prompts.txt", "--log_file", "a-long-name.jsonl")
    wanted = f"a-long-name-{'x' * 240}.jsonl cannot be written (File name too long); choose another --log_file\n"
    assert (code, files) == (2, ["prompts.txt"]) and said.endswith(f"error: {wanted}")
    (tmp_path / "long.txt").write_text('{"prompt": "A dog", "name": "%s"}\n' % ("x" * 300))
    said = run("--prompt_file", "long.txt")[1]
    assert said.endswith("(File name too long); choose another name in the file of prompts, or --save_dir\n")
    (tmp_path / "long.txt").unlink()
    (tmp_path / "prompts.txt").write_text('{"prompt": "A dog", "name": "%s"}\n' % ("x" * 246))
    code, said, files = run("--prompt_file", "prompts.txt", "--report", "report.png")
    assert (code, files) == (2, ["prompts.txt"]) and f"report-{'x' * 246}.png cannot be written (File name too" in said
    (tmp_path / "prompts.txt").write_text('{"prompt": "A cat", "name": "b"}\n{"prompt": "A cat", "name": "a-b"}\n')
    code, said, files = run("--prompt_file", "prompts.txt", "--report", "a.png")
    assert (code, files) == (2, ["prompts.txt"]) and "report a-b.png is the picture's own file; choose another" in said


@pytest.mark.parametrize(
    "flags, message",
    (
        ("--log_file run.txt", "log run.txt must end in .jsonl"),
        (
            "--log_file none/run.jsonl",
            "none/run.jsonl cannot be written (No such file or directory); choose another --log_file",
        ),
        ("--report report.pdf", "report report.pdf must end in .png"),
        ("--report none/r.png", "none/r.png cannot be written (No such file or directory); choose another --report"),
        ("--report out.png", "report out.png is the picture's own file; choose another --report"),
    ),
)
def test_wrong_files_are_one_line_before_anything_is_loaded(run, flags, message):
    code, said, files = run("--prompt", "x", "--save_file", "out.png", "--ckpt_dir", "nobody/none", *flags.split())
    assert (code, said, files) == (2, f"error: {message}\n", [])


def test_without_matplotlib_a_report_is_refused_before_anything_is_loaded(run, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    code, said, files = run("--prompt", "x", "--save_file", "out.png", "--report", "r.png")
    wanted = "error: report r.png needs matplotlib, which is not installed; pip install matplotlib\n"
    assert (code, said, files) == (2, wanted, [])


def test_a_full_disk_ends_the_log_with_whole_lines_and_a_warning(tmp_path, monkeypatch, caplog):
    log = RunLog(tmp_path / "run.jsonl")
    log.write([{"kind": "run"}])

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            self.file.write(text[:5])
            self.file.flush()
            raise OSError(28, "No space left on device")

    opened = type(log.path).open
    with monkeypatch.context() as patch:
        patch.setattr(
            type(log.path),
            "open",
            lambda path, mode, **how: Full(opened(path, mode, **how)) if mode == "a" else opened(path, mode, **how),
        )
        log.write([{"kind": "step"}])
    log.write([{"kind": "step"}])
    assert (tmp_path / "run.jsonl").read_text() == '{"kind": "run"}\n'
    assert caplog.messages == [f"warning: the log {log.path} ends here (No space left on device)"]


def test_records_of_no_step_make_no_report(tmp_path):
    with pytest.raises(InputError, match="of no sampling step"):
        report_data([{"kind": "run"}])


def test_processes_that_share_a_video_put_their_shares_together(tmp_path):
    sizes = replace(random_checkpoint.MODELS["nano"], heads=3, dim=192)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(random_checkpoint.MODELS, "three heads", sizes)
        random_checkpoint.write("three heads", tmp_path / "checkpoint", torch.float32)
    code, out, said = finish(fork(2, PROGRAMS / "watched.py", tmp_path / "checkpoint", cwd=tmp_path))
    assert code == 0, said
    results = [json.loads(line) for line in out.splitlines()]
    assert len(results) == 6
    for result in results:
        assert result["differs"] < 1e-6 and result["layers"] == 6 and result["examples"]
        assert max(abs(error) for _, error in result["examples"]) < 2e-6
