"""Tables of what the study found, in Markdown, and the same as means and intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from wan.tools.study.results import difference, find, interval, of_part
from wan.tools.study.rules import RULES
from wan.tools.study.settings import DENSE, QUARTER, Setting
from wan.tools.study.times import Times

Row = dict[str, Any]
DIGITS = 4


class Comparison(NamedTuple):
    """How much more of a measure one setting has than another, over the same samples."""

    part: str
    measure: str
    setting: Setting
    other: Setting


def summary(rows: Sequence[Row], times: Times) -> dict[str, Any]:
    """Facts of the runs, and for each setting its measures as mean and 95% interval, ready for JSON."""
    found = [
        {"part": row["part"], **Setting.of(row).fields, "samples": len(next(iter(row["values"].values())))}
        | {name: [round(value, DIGITS) for value in interval(some)] for name, some in row["values"].items()}
        for row in rows
        if row["part"] != "facts"
    ]
    return {"facts": [row["facts"] for row in of_part(rows, "facts")], "rows": found, "times": times.to_record()}


def tables(rows: Sequence[Row], times: Times) -> str:
    """All tables that there are rows for, with a heading each."""
    shares = sorted({row["share"] for row in of_part(rows, "error")})
    made = {
        "Error of the output, by rule and share": error_table(rows, shares),
        "By noise level, the noisiest first": level_table(rows),
        "Whole videos": _table(rows, "videos", ["psnr", "ssim"]),
        "Sentences": _table(rows, "sentences", ["colour", "kind", "direction", "all", "psnr"]),
        "Distillation": _table(rows, "distill", ["validation_dense", "validation_sparse"], ends=True),
        "Equal time": time_table(rows, shares, times),
        "Differences": difference_table(rows),
    }
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in made.items() if text)


def error_table(rows: Sequence[Row], shares: Sequence[float]) -> str:
    """A row a rule, with and without a dense layer 0, a column a share."""
    lines = []
    for layer_0 in (False, True):
        for rule, dropped in [(rule, "none") for rule in RULES] + [("means", "mean"), ("parts", "mean")]:
            settings = [Setting(rule, share, layer_0, dropped=dropped) for share in shares]
            found = [find(rows, "error", setting) for setting in settings]
            if any(found):
                cells = [_cell(row and row["values"]["error"], 3) for row in found]
                name = RULES[rule].words + (f", dropped {dropped}" if dropped != "none" else "")
                lines.append([name, "dense" if layer_0 else "sparse", *cells])
    return _markdown(["rule", "layer 0", *(f"{share:.0%}" for share in shares)], lines)


def level_table(rows: Sequence[Row]) -> str:
    """A row for some rules at a tenth and a fifth of the blocks, a column a noise level."""
    settings = [Setting(rule, share, True) for share in (0.2, 0.1) for rule in ("means", "parts", "best")]
    found = [row for setting in settings if (row := find(rows, "error", setting))]
    levels = [name for name in (found[0]["values"] if found else ()) if name.startswith("level")]
    return _table(found, "error", levels)


def time_table(rows: Sequence[Row], shares: Sequence[float], times: Times) -> str:
    """Errors with a dense layer 0 beside milliseconds of a layer of the 14B, fastest first."""
    lines: list[tuple[float, list[str]]] = []
    for row in of_part(rows, "error"):
        setting = Setting.of(row)
        milliseconds = times.of(setting)
        if milliseconds is not None and setting.weights is None:
            error = _cell(row["values"]["error"], 3)
            lines.append((milliseconds, [setting.words, f"{milliseconds:.1f} ms", error]))
    return _markdown(["setting", "attention a layer", "error"], [line for _, line in sorted(lines)])


def difference_table(rows: Sequence[Row]) -> str:
    """What the study was asked to show, over the same samples."""
    lines = []
    for one in comparisons():
        pair = [find(rows, one.part, setting) for setting in (one.setting, one.other)]
        if pair[0] and pair[1]:
            mean, low, high = difference(*(row["values"][one.measure] for row in pair if row))
            lines.append([one.measure, one.setting.words, one.other.words, f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"])
    return _markdown(["measure", "of", "more than of", "difference"], lines)


def comparisons() -> Iterator[Comparison]:
    for share in (0.1, 0.2):
        parts = Setting("parts", share, True, QUARTER)
        for other in (Setting("means", share, True, QUARTER), Setting("means", share, False, QUARTER)):
            yield Comparison("videos", "psnr", parts, other)
        with_means = Setting("parts", share, True, QUARTER, "mean")
        yield Comparison("videos", "psnr", with_means, parts)
        yield Comparison("error", "error", Setting("parts", share, True, 0.0, "mean"), Setting("parts", share, True))
        for setting in (Setting("parts", share, True), parts, Setting("means", share)):
            yield Comparison("sentences", "all", setting, Setting(DENSE))
    for layer_0 in (True, False):
        yield Comparison(
            "videos", "psnr", Setting("parts", 0.1, True, QUARTER), Setting("means", 0.3, layer_0, QUARTER)
        )
        yield Comparison("error", "error", Setting("parts", 0.1, True), Setting("means", 0.3, layer_0))


def _table(rows: Sequence[Row], part: str, measures: Sequence[str], decimals: int = 3, ends: bool = False) -> str:
    """A row a setting; ends: of each measure its first and last value, rather than mean and interval."""
    lines = []
    for row in of_part(rows, part):
        cells = []
        for name in measures:
            values = row["values"].get(name)
            cells.append(_change(values) if ends else _cell(values, 2 if name == "psnr" else decimals))
        lines.append([Setting.of(row).words, *cells])
    return _markdown(["setting", *(name.replace("_", " ") for name in measures)], lines)


def _cell(values: Sequence[float] | None, decimals: int) -> str:
    """The mean, and half the width of its interval."""
    if values is None:
        return ""
    mean, low, high = interval(values)
    return f"{mean:.{decimals}f} ± {(high - low) / 2:.{decimals}f}"


def _change(values: Sequence[float] | None) -> str:
    return "" if values is None else f"{values[0]:.4f} to {values[-1]:.4f}"


def _markdown(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table, or nothing where it has no lines."""
    if not lines:
        return ""
    shown = [titles, ["---"] * len(titles), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in shown)
