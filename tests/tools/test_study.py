"""The study of which blocks to keep: its rules against obvious twins, and the script from end to end at a tiny size."""

from __future__ import annotations

import json
import math

import pytest
import torch

import nabla
from nabla import InputError, NablaConfig
from nabla.selection import Selection, block_means
from wan.tools.study import program, rules
from wan.tools.study.results import Results, difference, find, interval, read_rows
from wan.tools.study.settings import QUARTER, Setting, of_errors, of_sentences, of_videos
from wan.tools.study.times import Times

# Tiles that no grid of these fills, and one that does.
GRIDS = ((2, 16, 16), (3, 11, 19))


def selection_of(grid, rule: str, keep: float = 0.3) -> tuple[rules.RuleSelection, torch.Tensor, torch.Tensor]:
    """A rule's selection, with q and k (1, S, heads, D) in raster order."""
    named = rules.RULES[rule]
    plain = Selection.build(grid, named.config(keep), "cpu")
    fields = {name: getattr(plain, name) for name in plain.__dataclass_fields__}
    q, k = torch.randn(2, 1, math.prod(grid), 2, 16, generator=torch.Generator().manual_seed(0))
    return rules.RuleSelection(**fields, rule=named.build()), q, k


def means_of(selection: Selection, x: torch.Tensor) -> torch.Tensor:
    return block_means(selection.layout.to_tiles(x), selection.layout)


def scores_of(selection: rules.RuleSelection, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return selection.rule(means_of(selection, q), means_of(selection, k), selection.layout)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_best_choice_is_by_the_attention_of_tokens(grid, monkeypatch):
    monkeypatch.setattr(rules, "ENTRIES", 2**16)
    selection, q, k = selection_of(grid, "best")
    block = selection.layout.slot // selection.layout.block
    shares = torch.einsum("bqhd,bkhd->bhqk", q, k).div(4).softmax(-1)
    wanted = torch.zeros(1, 2, selection.layout.blocks, selection.layout.blocks)
    for i in range(selection.layout.blocks):
        for j in range(selection.layout.blocks):
            wanted[..., i, j] = shares[:, :, block == i][..., block == j].sum(-1).mean(-1)
    torch.testing.assert_close(scores_of(selection, q, k), wanted)
    # It is nabla's own rule where every token is a part.
    own = nabla.select_blocks(q, k, grid, NablaConfig(keep=0.3, pool=(1, 1, 1), backend="reference"))
    assert torch.equal(selection.block_mask(means_of(selection, q), means_of(selection, k)), own)


@pytest.mark.parametrize("grid", GRIDS)
def test_log_sum_exp_is_over_pairs_of_parts_that_are_there(grid):
    selection, q, k = selection_of(grid, "log_sum_exp")
    layout, scores = selection.layout, scores_of(*selection_of(grid, "log_sum_exp"))
    q_parts, k_parts = (means_of(selection, x).unflatten(2, layout.part_sizes.shape) for x in (q, k))
    for i, j in ((0, 0), (1, 2), (layout.blocks - 1, 0), (0, layout.blocks - 1)):
        pairs = [
            (q_parts[0, 0, i, a] @ k_parts[0, 0, j, b] / 4).exp()
            for a in range(layout.parts)
            for b in range(layout.parts)
            if layout.part_sizes[i, a] and layout.part_sizes[j, b]
        ]
        torch.testing.assert_close(scores[0, 0, i, j], torch.stack(pairs).sum().log())


@pytest.mark.parametrize("rule", rules.RULES)
@pytest.mark.parametrize("keep", (0.05, 0.3))
def test_every_row_keeps_its_share(rule, keep):
    if rules.RULES[rule].build is None:
        return
    selection, q, k = selection_of((5, 32, 32), rule, keep)
    mask = selection.block_mask(means_of(selection, q), means_of(selection, k))
    assert (mask.sum(-1) == math.ceil(keep * 80)).all()
    if rule not in ("best", "log_sum_exp"):
        assert mask.diagonal(dim1=-2, dim2=-1).all()


def test_windows_keep_what_is_near():
    selection, q, k = selection_of((9, 32, 32), "sta_cube", 27 / 144)
    mask = selection.block_mask(means_of(selection, q), means_of(selection, k))[0, 0]
    # The middle block's own window, of three blocks on each axis, without a tie.
    middle = mask[4 * 16 + 1 * 4 + 1].view(9, 4, 4)
    assert middle[3:6, :3, :3].all() and middle.sum() == 27
    radial, q, k = selection_of((9, 32, 32), "radial", 0.2)
    near = radial.block_mask(means_of(radial, q), means_of(radial, k))[0, 0, 0].view(9, 16).sum(-1)
    # Fewer of a frame, the farther it is.
    assert near[0] >= near[1] >= near[2] >= near[4] >= near[8] and near[0] > near[4]


def test_random_blocks_are_others_in_every_layer():
    selection, q, k = selection_of((2, 16, 16), "random")
    first, second = (scores_of(selection, q, k) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, scores_of(*selection_of((2, 16, 16), "random")))


def test_settings_are_told_apart_and_named():
    for every in (of_errors, of_videos, of_sentences):
        settings = list(every((0.05, 0.1, 0.2, 0.3, 0.5)))
        assert len(set(settings)) == len({one.words for one in settings}) == len(settings)
        for one in settings:
            assert one.config(6).is_dense == (one.rule == "dense") and Setting.of(one.fields) == one


def test_intervals():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    mean, low, high = interval(values)
    # Of a normal distribution's mean: 1.96 deviations over the root of the count, 0.098, to each side.
    assert low < mean < high and high - low == pytest.approx(0.196, rel=0.15)
    assert difference([one + 1 for one in values], values) == pytest.approx((1, 1, 1))


def test_a_line_that_was_cut_leaves_no_trace(tmp_path):
    setting, file = Setting("parts", 0.1), tmp_path / "results.jsonl"
    Results(tmp_path).add("error", setting, 1.0, error=[0.5])
    with file.open("a") as lines:
        lines.write('{"part": "err')
    Results(tmp_path).add("videos", setting, 1.0, psnr=[20.0])
    assert [row["part"] for row in read_rows(file)] == ["error", "videos"]


def test_times_of_a_layer(tmp_path):
    rows = {"1280x720x81: dense, cudnn": 180.0, "1280x720x81: dense, flash": 300.0}
    rows |= {"1280x720x81: attend by flex, keep-0.1_pool-1-4-4": 30.0, "1280x720x81: flex, keep 0.1": 25.0}
    printed = tmp_path / "printed.txt"
    printed.write_text("a table\n" + json.dumps({"rows": [{"what": what, "ms": ms} for what, ms in rows.items()]}))
    times = Times.read([printed])
    assert times.of(Setting("parts", 0.1)) == 30 and times.of(Setting("radial", 0.1)) == 25
    assert times.of(Setting("parts", 0.1, True)) == pytest.approx((180 + 39 * 30) / 40)
    assert times.of(Setting("parts", 0.1, False, QUARTER)) == pytest.approx(0.25 * 180 + 0.75 * 30)
    assert times.of(Setting("parts", 0.2)) is None and times.of(Setting("best", 0.1)) is None
    with pytest.raises(InputError, match="are not what"):
        Times.read([tmp_path / "missing.txt"])


def test_script_measures_goes_on_and_reports(random_nano, tmp_path, capsys):
    folder = tmp_path / "study"
    flags = f"measure --out {folder} --ckpt_dir {random_nano} --device cpu --size 64*64 --frame_num 5 --steps 5"
    flags += " --shares 0.3 --prompts 1 --videos 1 --seeds 1 --sentences 1 --batch 1 --rules parts random"
    assert program.main([*flags.split(), "--parts", "error", "videos", "sentences"]) == 0
    rows = read_rows(folder / "results.jsonl")
    wanted = [one for one in of_errors([0.3]) if one.rule in ("parts", "random")]
    assert [Setting.of(row) for row in rows if row["part"] == "error"] == wanted
    dense = find(rows, "sentences", Setting("dense"))
    assert dense and set(dense["values"]) == {"colour", "kind", "direction", "all"}
    errors = [row["values"]["error"] for row in rows if row["part"] == "error"]
    assert all(len(some) == 1 and 0 < min(some) for some in errors)
    capsys.readouterr()
    assert program.main([*flags.split(), "--parts", "error", "videos"]) == 0
    assert not capsys.readouterr().out and read_rows(folder / "results.jsonl") == rows
    with pytest.raises(InputError, match="was measured with steps 5, and this is 6; give that again"):
        program.main([*flags.split(), "--steps", "6", "--parts", "error"])
    report = ["report", str(folder / "results.jsonl"), "--json", str(tmp_path / "study.json")]
    assert program.main([*report, "--picture", str(tmp_path / "study.png")]) == 0
    printed = capsys.readouterr().out
    assert "| 2x2 parts | dense | 0" in printed and "### Whole videos" in printed
    found = json.loads((tmp_path / "study.json").read_text())
    assert len(found["rows"]) == len(rows) - 1 and (tmp_path / "study.png").stat().st_size > 10_000


def test_script_distils_and_measures_that(random_nano, tmp_path):
    folder = tmp_path / "study"
    flags = f"measure --out {folder} --ckpt_dir {random_nano} --device cpu --size 64*64 --frame_num 5 --steps 4"
    flags += " --shares 0.5 --prompts 1 --videos 1 --seeds 1 --sentences 1 --batch 1 --parts distill"
    flags += " --clips 3 --distill_steps 2 --distill_batch 2 --distill_shares 0.5"
    assert program.main(flags.split()) == 0
    rows = read_rows(folder / "results.jsonl")
    distilled = Setting("parts", 0.5, True, weights=0.5)
    losses = find(rows, "distill", distilled)
    assert losses and len(losses["values"]["validation_sparse"]) == 2
    assert all(find(rows, part, distilled) for part in ("error", "videos", "sentences"))


@pytest.mark.parametrize("flags", ("--minutes error", "--minutes none=2", "--workers -1"))
def test_wrong_flags_are_told(flags, tmp_path):
    with pytest.raises(InputError):
        program.main(["measure", "--out", str(tmp_path / "study"), *flags.split()])
