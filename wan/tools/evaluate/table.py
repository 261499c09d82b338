"""What came out, as a table for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Of each measure its heading, and how a value is written.
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "kept": ("kept", "{:.1%}".format),
    "seconds": ("seconds", "{:.1f}".format),
    "psnr": ("PSNR, dB", "{:.2f}".format),
    "ssim": ("SSIM", "{:.4f}".format),
    "lpips": ("LPIPS", "{:.4f}".format),
    "clip": ("CLIP score", "{:.2f}".format),
}


def table_of(results: Mapping[str, Any]) -> str:
    """Two tables in Markdown, of settings and of differences, and lines of what they leave out."""
    settings, differences = results["settings"], results["differences"]
    # A measure that nobody took has no column.
    names = [name for name in COLUMNS if any(one[name] is not None for one in settings)]
    heads = [COLUMNS[name][0] for name in names]
    rows = [[one["name"], str(one["videos"]), _speedup(one), *_cells(one, names)] for one in settings]
    said = [_table(["setting", "videos", "speed", *heads], rows)]
    differing = [[one["name"], *_cells(one, names, signed=True)] for one in differences]
    said.append(_table([f"minus {results['against']}", *heads], differing))
    level, prompts = results["interval"]["level"], results["prompts"]
    about = f"In brackets: {level:.0%} intervals by the bootstrap over {prompts} prompts; differences video by video."
    more = [f"{one['name']} is {what}." for one in settings if (what := _beyond_name(one))]
    missing = [f"No {COLUMNS[name][0]}: {why}." for name, why in results["missing"].items()]
    return "\n\n".join([*said, "\n".join([about, *more, *missing])]) + "\n"


def _beyond_name(one: Mapping[str, Any]) -> str:
    """What a setting runs that its name does not say."""
    attention, cache = one["attention"], one["cache"]
    algorithm = attention.get("algorithm", "by a profile")
    said = [] if algorithm == one["name"] else [algorithm]
    for name, usual in (("dense_steps", 0), ("dense_layers", ()), ("mask_refresh", 1)):
        value = attention.get(name, usual)
        if isinstance(value, float | int) and value != usual:
            said.append(f"{name} {value:g}")
        elif not isinstance(value, float | int) and tuple(value) != usual:
            said.append(f"{name} {' '.join(map(str, value))}")
    said += [] if cache is None else [f"cache {cache['kind']}"]
    return ", ".join(map(str, said))


def _speedup(one: Mapping[str, Any]) -> str:
    return "" if one["speedup"] is None else f"{one['speedup']:.2f}x"


def _cells(one: Mapping[str, Any], names: Sequence[str], signed: bool = False) -> list[str]:
    return [_cell(one[name], COLUMNS[name][1], signed) for name in names]


def _cell(found: Mapping[str, Any] | None, write: Callable[[float], str], signed: bool) -> str:
    if found is None:
        return ""

    def written(value: float) -> str:
        return f"+{write(value)}" if signed and value > 0 else write(value)

    mean, low, high = (found[key] if found[key] is None else written(found[key]) for key in ("mean", "low", "high"))
    # One that has no width as it is written says nothing more.
    return mean if low is None or low == mean == high else f"{mean} [{low}, {high}]"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns in line for whoever reads it as it is."""
    lines = [heads, ["---"] * len(heads), *rows]
    widths = [max(len(line[number]) for line in lines) for number in range(len(heads))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |".rstrip() for line in padded)
