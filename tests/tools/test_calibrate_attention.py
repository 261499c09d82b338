"""What layers lose at shares of their blocks, profiles that are solved for, and the program that does both."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import runpy
import statistics
import sys
from fractions import Fraction
from functools import partial

import kandinsky_set
import pytest
import torch
import vace_pipelines
import yaml
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

import generate
from nabla import InputError, NablaConfig
from nabla.profile import KeepProfile
from wan.attention.apply import apply_attention
from wan.config.attention_settings import attention_config
from wan.config.settings import SamplingSettings
from wan.models.kandinsky import processor as kandinsky
from wan.models.wan.processor import TRANSFORMER, VACE_TRANSFORMER
from wan.models.wan.random_checkpoint import random_transformer
from wan.tools.calibrate_attention import design as designs
from wan.tools.calibrate_attention import sensitivity
from wan.tools.calibrate_attention.cost import Cost
from wan.tools.calibrate_attention.profile_file import profile_of, write_profile
from wan.tools.calibrate_attention.records import Forward, Records
from wan.tools.calibrate_attention.seats import Seats, at_share
from wan.tools.calibrate_attention.solve import Problem, solve
from wan.tools.calibrate_attention.stretches import Span, Walk, spans_of, walk_of
from wan.tools.calibrate_attention.table import Table, outputs_of, solve_keep, table_of
from wan.tools.calibrate_attention.timing import VideoTime

SCRIPT = ROOT / "scripts" / "calibrate_attention.py"
SHARES = (0.1, 0.3, 0.5)
CONFIG = NablaConfig(keep=0.1, tile=(1, 4, 4), pool=(1, 2, 2), backend="reference")


def best_by_trying_all(problem):
    """Its slow twin: the least error of all combinations that the budget allows."""
    found = math.inf
    for choices in itertools.product(*(range(len(costs)) for costs in problem.costs)):
        pairs = list(zip(range(len(choices)), choices))
        if sum(problem.costs[g][c] for g, c in pairs) <= problem.budget:
            found = min(found, math.fsum(problem.errors[g][c] for g, c in pairs))
    return found


groups = st.lists(
    st.lists(st.tuples(st.floats(0, 10), st.integers(0, 30)), min_size=1, max_size=4), min_size=1, max_size=5
)


@given(groups, st.integers(0, 120), st.sampled_from((1, Fraction(1, 20), Fraction(1, 3))))
def test_the_solver_finds_what_trying_all_finds(groups, budget, unit):
    errors, costs = ([[pair[n] for pair in group] for group in groups] for n in (0, 1))
    problem = Problem(errors, [[cost * unit for cost in own] for own in costs], budget * unit)
    best, chosen = best_by_trying_all(problem), solve(problem)
    if math.isinf(best):
        assert chosen is None
        return
    assert sum(problem.costs[g][c] for g, c in enumerate(chosen)) <= problem.budget
    assert math.fsum(errors[g][c] for g, c in enumerate(chosen)) == pytest.approx(best, abs=1e-9)


def test_costs_of_any_fineness_stay_within_the_budget_and_near_the_best():
    draw = random.Random(0)
    costs = [[draw.uniform(1, 20) for _ in range(4)] for _ in range(6)]
    errors = [[draw.uniform(0, 1) for _ in range(4)] for _ in range(6)]
    problem = Problem(errors, costs, 67.123456789)
    chosen = solve(problem)
    assert sum(costs[g][c] for g, c in enumerate(chosen)) <= problem.budget
    assert math.fsum(errors[g][c] for g, c in enumerate(chosen)) == pytest.approx(best_by_trying_all(problem))


@given(
    st.integers(1, 60), st.integers(1, 6), st.integers(0, 20), st.sampled_from((None, 0.875, 0.5)), st.integers(1, 12)
)
def test_stretches_end_with_their_steps_where_experts_swap_and_each_has_a_step_of_the_walk(
    steps, count, dense, boundary, least
):
    sampling = SamplingSettings(steps=steps)
    if dense >= steps or count > steps - dense:
        with pytest.raises(InputError, match="stretches|dense_steps"):
            spans_of(sampling, boundary, dense, count)
        return
    spans = spans_of(sampling, boundary, dense, count)
    assert spans[0].begin == dense and spans[-1].end == steps
    assert all(one.end == after.begin and one.steps > 0 for one, after in zip(spans, spans[1:]))
    walk = walk_of(sampling, boundary, spans, least)
    assert all(walk.of(number) for number in range(len(spans)))
    shares = [[0.1 + number / 100] for number in range(len(spans))]
    profile = KeepProfile.from_dict(
        {"stretches": profile_of(spans, shares, steps, NablaConfig(keep=0.1), {})["stretches"]}
    )
    for number, span in enumerate(spans):
        for step in range(span.begin, span.end):
            assert profile.stretch_at(step, steps).keep == tuple(shares[number])
    assert profile.dense_step_count(steps) == dense
    # In no time, since what is described of a run is asked behind all steps.
    assert 0 <= profile.dense_step_count(10**9) <= 10**9


def wan_model():
    model = random_transformer("nano", torch.float32, torch.device("cpu"), layers=3)
    inputs = torch.randn(1, 16, 3, 16, 24), torch.tensor([500]), torch.randn(1, 5, model.config.text_dim)
    return model, TRANSFORMER, lambda: model(*inputs, return_dict=False)[0]


def vace_model():
    model = vace_pipelines.transformer(num_layers=4)
    latents, control = torch.randn(2, 16, *vace_pipelines.LATENTS), torch.randn(2, 96, *vace_pipelines.LATENTS)
    inputs = latents, torch.tensor([500, 500]), torch.randn(2, 5, 32)
    return model, VACE_TRANSFORMER, lambda: model(*inputs, control_hidden_states=control, return_dict=False)[0]


def kandinsky_model():
    model, _ = kandinsky_set.transformer()
    return model, kandinsky.TRANSFORMER, lambda: kandinsky_set.velocity(model)[None]


@pytest.mark.parametrize("make", (wan_model, vace_model, kandinsky_model))
def test_errors_are_those_of_forwards_in_which_one_layer_alone_is_sparse(make):
    torch.manual_seed(0)
    model, spec, forward = make()
    layers = range(len(spec.blocks_of(model)))
    with torch.no_grad():
        exact = forward()
        apply_attention([model], CONFIG, spec)
        found = []
        with Seats(model, spec).taken() as seats:
            same = sensitivity.measure_layers(seats, SHARES, forward, layers, SHARES[:2], 0, found.append)
        torch.testing.assert_close(same, exact)
        assert [one.layer for one in found] == list(layers)
        for one in found:
            assert one.output[2] is None and all(own > 0 for own in one.own)
            for share, output in zip(SHARES[:2], one.output):
                others = tuple(n for n in layers if n != one.layer)
                alone = NablaConfig(**vars(at_share(CONFIG, share)) | {"dense_layers": others})
                apply_attention([model], alone, spec)
                slow = ((forward() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).square().mean()
                assert output == pytest.approx(slow.item(), rel=1e-3)
    # Nothing of the measuring is left.
    assert not any(isinstance(module, sensitivity.Seats) for module in model.modules())
    assert [type(block) for block in spec.blocks_of(model)][-1] is spec.block


def test_outputs_are_kept_in_groups_where_host_memory_is_small(monkeypatch):
    torch.manual_seed(0)
    model, spec, forward = wan_model()
    apply_attention([model], CONFIG, spec)
    results = []
    for most in (3, 1):
        monkeypatch.setattr(
            sensitivity, "groups_that_fit", lambda layers, *_: [list(layers[n : n + most]) for n in range(0, 3, most)]
        )
        found = []
        with Seats(model, spec).taken() as seats:
            sensitivity.measure_layers(seats, SHARES, forward, range(3), SHARES, 0, found.append)
        results.append(found)
    assert results[0] == results[1]


def line(step, layer, own, output, prompt=0):
    return {"prompt": prompt, "step": step, "branch": 0, "layer": layer, "own": own, "output": output}


def test_gains_carry_own_errors_to_the_velocity():
    walk = Walk(4, (None, 0, 0, 1))
    records = [
        line(1, 0, [4.0, 2.0], [None, 1.0]),
        line(2, 0, [6.0, 4.0], [None, None]),
        line(3, 0, [1.0, 1.0], [3.0, 5.0]),
    ]
    assert outputs_of(records, walk) == [[2.0, 1.0], [3.0, 2.0], [3.0, 5.0]]
    table = table_of(records, [Span(1, 3), Span(3, 4)], walk, (0.1, 0.2))
    assert table.errors == (((2.5, 1.5),), ((3.0, 5.0),))


def test_the_fast_way_ranks_layers_and_shares_as_the_exact_one_does():
    torch.manual_seed(0)
    model, spec, _ = wan_model()
    apply_attention([model], CONFIG, spec)
    exact = []
    for step in range(2):
        inputs = torch.randn(1, 16, 3, 16, 24), torch.tensor([500]), torch.randn(1, 5, model.config.text_dim)
        found, run = [], partial(model, *inputs, return_dict=False)
        with Seats(model, spec).taken() as seats:
            sensitivity.measure_layers(seats, SHARES, lambda: run()[0], range(3), SHARES, 0, found.append)
        exact += [line(step, one.layer, list(one.own), list(one.output)) for one in found]
    # Up to the velocity at one share in the first forward alone.
    fast = [one | {"output": [None, one["output"][1] if one["step"] == 0 else None, None]} for one in exact]
    carried, known = ([n for row in outputs_of(lines, Walk(2, (0, 0))) for n in row] for lines in (fast, exact))
    assert all(0.5 < one / other < 2 for one, other in zip(carried, known))
    order = [sorted(range(len(known)), key=values.__getitem__) for values in (carried, known)]
    places = [sorted(range(len(known)), key=one.__getitem__) for one in order]
    assert statistics.correlation(*places) > 0.8


TABLE = Table((Span(0, 3), Span(3, 4)), (0.1, 0.4), (((0.09, 0.01), (0.0001, 0.0)), ((0.04, 0.01), (0.0004, 0.0001))))


def test_profiles_give_more_to_layers_that_lose_more():
    keep = solve_keep(TABLE, 0.25)
    assert TABLE.mean_keep(keep) <= 0.25 and keep == [[0.4, 0.1], [0.4, 0.1]]
    # What all may keep is a choice too, so that no profile is worse.
    assert all(
        TABLE.predicted(solve_keep(TABLE, share)) <= TABLE.predicted(TABLE.uniform(share))
        for share in (0.11, 0.2, 0.39)
    )
    assert TABLE.predicted(keep) < TABLE.predicted(TABLE.uniform(0.25)) / 1.3
    assert TABLE.predicted(TABLE.uniform(0.1)) == pytest.approx((3 * math.sqrt(0.0901) + math.sqrt(0.0404)) / 4)
    assert TABLE.error(0, 0, 0.2) == pytest.approx(0.03) and TABLE.error(0, 0, 0.7) == pytest.approx(0.005)
    assert TABLE.predicted(TABLE.uniform(1)) == 0
    with pytest.raises(InputError, match="keep 0.05 is below 0.1, the least of --shares"):
        solve_keep(TABLE, 0.05)


def test_the_least_share_is_found_where_costs_are_rounded_up():
    layers, spans = 30, tuple(Span(begin, end) for begin, end in ((13, 22), (22, 31), (31, 40), (40, 50)))
    table = Table(spans, (0.123, 0.4), tuple(((0.09, 0.01),) * layers for _ in spans))
    assert solve_keep(table, 0.123) == table.uniform(0.123)


def test_a_profile_names_what_it_was_measured_with(tmp_path):
    measured = NablaConfig(keep=0.1, pool=(1, 4, 4), window=(3, 1, 1), dropped="mean")
    write_profile(tmp_path / "own.yaml", profile_of([Span(2, 5)], [[0.1, 1.0]], 5, measured, {}))
    run = attention_config({"profile": str(tmp_path / "own.yaml")})
    assert run.at(0, 2, 4, 5) == measured and run.at(1, 2, 4, 5).is_dense and run.at(0, 2, 1, 5).is_dense


def test_seconds_are_kept_and_those_that_are_too_few_are_refused():
    cost = Cost((2,), (100.0,), {0.1: (20.0,), 0.4: (50.0,)}, outside=10.0, nbytes=0, calls=2)
    time = VideoTime(TABLE, cost, calls=(2, 2), dense_calls=2, around=1.0)
    # Text and decoder, two dense forwards, eight of two layers.
    assert time.seconds(TABLE.uniform(0.1)) == pytest.approx(1 + 2 * 0.21 + 8 * 0.05)
    keep = time.solve(2.1)
    assert time.seconds(keep) <= 2.1 and TABLE.predicted(keep) < TABLE.predicted(TABLE.uniform(0.1))
    share = time.uniform_share(2.1)
    assert time.seconds(TABLE.uniform(share)) == pytest.approx(2.1, abs=0.01)
    with pytest.raises(InputError, match="seconds 1.5 is too short: a video takes 1.8 s here with a share of 0.1"):
        time.solve(1.5)
    assert Cost.of_record(json.loads(json.dumps(cost.to_record()))) == cost
    assert cost.saved(0.4) == pytest.approx(0.5) and cost.block(1, 0.25) == pytest.approx(35)


def test_the_fast_way_is_of_one_branch_in_turns_and_takes_a_part_of_the_time():
    design = designs.Design(2, 1, (Span(0, 2), Span(2, 4)), Walk(4, (0, 0, 1, 1)), SHARES)
    exact, fast = (design.forwards(2, exact) for exact in (True, False))
    assert len(exact) == 16 and set(exact.values()) == {SHARES}
    assert list(fast) == [Forward(p, s, (p + s) % 2) for p in (0, 1) for s in range(4)]
    assert [one for one, whole in fast.items() if whole] == [Forward(0, 0, 0), Forward(0, 2, 0)]
    cost = Cost((40,), (250.0,), dict.fromkeys(SHARES, (100.0,)), outside=500.0, nbytes=0, calls=2)
    assert design.seconds(cost, False) < design.seconds(cost, True) / 5


@pytest.fixture
def calibrate(random_nano, tmp_path, monkeypatch):
    """scripts/calibrate_attention.py: `calibrate(*flags)` -> its exit code; the profile is profile.yaml."""
    (tmp_path / "prompts.txt").write_text("A red circle\nA cat\nTwo dogs")
    files = ["--prompt_file", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "profile.yaml")]
    small = "--size 64*96 --frame_num 5 --steps 6 --walk_steps 3 --stretches 2 --shares 0.1 0.5".split()
    (tmp_path / "config.yaml").write_text("attention: {algorithm: keep-0.5, tile: [1, 2, 2], dense_steps: 1}")

    def calibrate(*flags, checkpoint=random_nano, budget=("--keep", "0.4")):
        given = ["--ckpt_dir", str(checkpoint), "--config", str(tmp_path / "config.yaml"), *files, *small, *budget]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--device", "cpu", *given, *flags])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return ended.value.code

    return calibrate


def measurements(tmp_path):
    lines = (tmp_path / "profile.measured.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def keys(lines):
    """What each line measures."""
    names = "kind", "prompt", "step", "branch", "layer", "name"
    return [tuple(line.get(name) for name in names) for line in lines]


def test_a_run_that_is_cut_goes_on_and_measures_nothing_twice(calibrate, tmp_path, monkeypatch, capsys):
    class Cut(BaseException):
        pass

    add = Records.add

    def cut(self, kind, **values):
        if len(self.lines) == 9:
            raise Cut
        add(self, kind, **values)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(Records, "add", cut)
        calibrate("--mode", "exact")
    assert not (tmp_path / "profile.yaml").exists()
    before = measurements(tmp_path)
    assert len(before) == 9
    # As a program that is killed while it writes leaves it.
    with (tmp_path / "profile.measured.jsonl").open("a") as file:
        file.write('{"kind": "lay')
    assert calibrate("--mode", "exact") == 0, capsys.readouterr().err
    after = measurements(tmp_path)
    assert after[: len(before)] == before and len(set(keys(after))) == len(after)
    # 2 prompts, 2 of 3 steps, 2 branches, 2 layers; and a third prompt's 4 forwards with each profile.
    assert [line["kind"] for line in after].count("layer") == 2 * 2 * 2 * 2
    assert [line["kind"] for line in after].count("check") == 4 * len({line.get("name") for line in after} - {None})
    profile = yaml.safe_load((tmp_path / "profile.yaml").read_text())
    assert set(profile) == {"stretches", "tile", "measured_on"}
    assert profile["stretches"][0] == {"until": 0.166666, "keep": [1.0, 1.0]}
    about = profile["measured_on"]
    assert (about["checkpoint"], about["steps"], about["seeds"], about["layers"]) == ("nano", 6, [0, 1], 2)
    found = about["found"]
    assert found["profile"]["keep"] <= 0.4 and found["uniform"]["keep"] == 0.4
    assert found["profile"]["predicted_error"] > 0 and found["profile"]["checked_error"] > 0
    KeepProfile.from_dict({name: profile[name] for name in ("stretches", "measured_on")})


def test_other_budgets_take_no_measurement_and_other_settings_are_refused(calibrate, tmp_path, monkeypatch, capsys):
    assert calibrate("--mode", "fast", "--check", "0") == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert "measuring 3 prompts in 2 of 3 steps by gains (fast): about" in said.err and "profile" in said.out
    before = measurements(tmp_path)

    def never(*_):
        raise AssertionError("nothing is loaded")

    monkeypatch.setattr("wan.tools.calibrate_attention.job.load_pipeline", never)
    assert calibrate("--mode", "fast", "--check", "0", budget=("--seconds", "100000")) == 0
    assert measurements(tmp_path) == before
    profile = yaml.safe_load((tmp_path / "profile.yaml").read_text())
    assert all(share == 1 for one in profile["stretches"] for share in one["keep"])
    (tmp_path / "profile.yaml").unlink()
    for flags, budget, message in (
        ((), ("--seconds", "0.001"), "error: seconds 0.001 is too short: a video takes"),
        ((), ("--keep", "0.05"), "error: keep 0.05 is below 0.1, the least of --shares"),
        (("--sample_shift", "3"), ("--keep", "0.4"), "was measured with shift 5.0, and this is 3.0"),
        (("--pool", "1-2-1"), ("--keep", "0.4"), "was measured with attention NablaConfig("),
        (("--check", "3"), ("--keep", "0.4"), "error: check 3 leaves none of 3 prompts to measure; give 0 to 2"),
        (("--stretches", "9"), ("--keep", "0.4"), "error: stretches 9: 5 steps are not dense already; give 1 to 5"),
        (("--pool", "1-3-1"), ("--keep", "0.4"), "error: pool (1, 3, 1) does not divide tile"),
    ):
        given = ("--mode", "fast", "--check", "0", *flags)
        assert calibrate(*given, budget=budget) == 2
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said
    assert not (tmp_path / "profile.yaml").exists() and measurements(tmp_path) == before


@pytest.mark.parametrize(
    "flags, message",
    (
        (("--cache", "mag"), "--cache is not for calibrating attention"),
        (("--sparse_algo", "dense"), "--sparse_algo is not for calibrating attention"),
        (("--shares", "1.5"), "'1.5' is no share of blocks, above 0 and below 1"),
        (("--shares", "nan"), "'nan' is not a number such as 0.15"),
        (("--pool", "1x4"), "'1x4' is not frames-rows-columns, such as 1-4-4"),
        (("--seconds", "0.0"), "'0.0' is no time in seconds"),
        (("--plot", "picture.jpg"), "plot picture.jpg must end in .png"),
    ),
)
def test_flags_that_mean_nothing_are_refused_in_a_line(calibrate, flags, message, capsys):
    budget = () if flags[0] == "--seconds" else ("--keep", "0.4")
    assert calibrate(*flags, budget=budget) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_a_file_of_something_else_is_refused(calibrate, tmp_path, capsys):
    (tmp_path / "profile.measured.jsonl").write_text('{"kind": "cost"}\n')
    assert calibrate() == 2
    assert "is no file of measurements (line 1 is no measurement)" in capsys.readouterr().err


def test_the_profile_is_drawn_and_runs(calibrate, random_nano, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert calibrate("--pool", "1-1-1", "--plot", str(tmp_path / "plot.png"), "--check", "0") == 0
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    (tmp_path / "run.yaml").write_text("attention: {profile: profile.yaml}")
    capsys.readouterr()
    small = f"--size 64*96 --frame_num 5 --sample_steps 6 --device cpu --ckpt_dir {random_nano} --prompt x".split()
    flags = ["--config", str(tmp_path / "run.yaml"), "--save_file", str(tmp_path / "x.mp4"), *small]
    assert generate.main(flags) == 0, capsys.readouterr().err
    said = capsys.readouterr().err
    assert "attention: profile-" in said and "measured with" not in said
    made = json.loads((tmp_path / "x.json").read_text())["settings"]["attention"]
    assert made["profile"]["measured_on"]["found"]["profile"]["keep"] <= 0.4
    assert made["pool"] == [1, 1, 1] and made["tile"] == [1, 2, 2]


@pytest.fixture(scope="session")
def two_experts(tmp_path_factory):
    from wan.models.wan import random_checkpoint

    folder = tmp_path_factory.mktemp("experts") / "nano"
    random_checkpoint.write("t2v-A14B-nano", folder, torch.float32)
    return folder


def test_each_expert_is_measured_in_its_own_steps(calibrate, two_experts, tmp_path, capsys):
    flags = "--mode", "exact", "--check", "2", "--sample_guide_scale", "3,4"
    assert calibrate(*flags, checkpoint=two_experts) == 0, capsys.readouterr().err
    lines = measurements(tmp_path)
    assert {expert for *_, expert in lines[0]["stretches"]} == {0, 1}
    profile = yaml.safe_load((tmp_path / "profile.yaml").read_text())
    assert len({tuple(one["keep"]) for one in profile["stretches"]}) > 1


def test_kandinsky_is_measured_too(calibrate, kandinsky_nano, tmp_path, capsys):
    assert calibrate("--mode", "exact", "--check", "2", checkpoint=kandinsky_nano) == 0, capsys.readouterr().err
    layers = [line for line in measurements(tmp_path) if line["kind"] == "layer"]
    assert layers and all(error > 0 for line in layers for error in line["output"][:1])
    assert os.path.getsize(tmp_path / "profile.yaml")
