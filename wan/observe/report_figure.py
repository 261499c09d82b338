"""The figure of a report, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from wan.config.checks import guide_scale_text
from wan.observe.events import Event
from wan.observe.report_data import ReportData
from wan.observe.step_trace import MaskExample

INK, FAINT, RULE = "#22303c", "#5f6f7e", "#d8dee4"
BLUE, AMBER, TEAL, VIOLET, PALE, GREY = "#17527c", "#e39b3b", "#3d9a8b", "#8a79b8", "#8fb3cf", "#d3dae0"
DENSITIES = LinearSegmentedColormap.from_list("densities", ("#eef5f4", "#9fd0c9", "#3a8fa6", "#17527c", "#0d2540"))
BLOCKS = ListedColormap(("#f3f6f8", BLUE, AMBER))
STAGES = {"loading": GREY, "text": VIOLET, "sampling": BLUE, "decode": TEAL}
PARTS = {"mask": AMBER, "attention": BLUE, "rest of the blocks": PALE, "outside blocks": GREY}
STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": RULE,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
# In inches: the width, and the heights of the row of densities and times and of that of masks.
WIDTH, TOP, MASKS = 12.0, 5.4, 2.75
# The heat map's colours span at least so much of the densities, so that noise does not look like a difference.
LEAST_SPAN = 0.02
# Of a prompt, in the title.
LETTERS = 90


def figure_of(run: Event, data: ReportData) -> Figure:
    """A figure of the data of a run, whose first event is given."""
    with rc_context(STYLE):
        rows = [TOP, MASKS] if data.examples else [TOP]
        # Not by pyplot, which keeps every figure, and sets a backend, for the whole process.
        figure = Figure(figsize=(WIDTH, sum(rows)), layout="constrained")
        # Of a single row matplotlib gives the part itself, not an array.
        parts = np.atleast_1d(figure.subfigures(len(rows), 1, height_ratios=rows))
        _title(parts[0], run)
        grid = parts[0].add_gridspec(2, 3, width_ratios=(30, 0.6, 11), height_ratios=(3, 1))
        heat = parts[0].add_subplot(grid[0, 0])
        _draw_densities(heat, parts[0].add_subplot(grid[0, 1]), data)
        _draw_by_step(parts[0].add_subplot(grid[1, 0], sharex=heat), data)
        _draw_seconds(parts[0].add_subplot(grid[0, 2]), "Time by stage", data.stages, STAGES)
        _draw_parts(parts[0].add_subplot(grid[1, 2]), data.parts)
        if data.examples:
            _draw_examples(parts[1], run, data)
        return figure


def legible(text: str) -> tuple[str, list[str]]:
    """A text of characters that installed fonts have, saying how many it leaves out, and the fonts' families.

    A picture's text would have boxes for the others.
    """
    usual = font_manager.FontProperties().get_family()
    missing, families = set(text) - _characters(font_manager.findfont(font_manager.FontProperties())), []
    for font in font_manager.fontManager.ttflist if missing else ():
        # This one has a box for everything.
        has = set() if font.name.startswith("Last Resort") else missing & _characters(font.fname)
        families += [font.name] if has else []
        missing -= has
    count = sum(character in missing for character in text)
    kept = "".join(character for character in text if character not in missing).strip()
    note = f"({count} characters that no font here has; the picture's description has the whole prompt)"
    return f"{kept} {note}".strip() if count else text, [*usual, *families]


def _characters(file: str) -> set[str]:
    """Those that a font's file has, if it can be drawn in any size."""
    try:
        font = font_manager.get_font(file)
    except (OSError, RuntimeError):
        return set()
    return set(map(chr, font.get_charmap())) if font.scalable else set()


def _title(part: SubFigure, run: Event) -> None:
    prompt = " ".join((run.get("prompt") or "").split())
    prompt, families = legible(prompt if len(prompt) <= LETTERS else f"{prompt[: LETTERS - 2].rstrip()} …")
    size = f"{'x'.join(map(str, run['size']))}, {run['frame_num']} frames" if "size" in run else ""
    walk = f"{run['steps']} steps of {run['solver']}, guidance {guide_scale_text(run['guide_scale'])}"
    of = f"{run['layers']} layers of {run['heads']} heads, {'x'.join(map(str, run['grid']))} tokens"
    facts = [run["attention"], size, walk, of, f"{run['device']} in {run['dtype']}"]
    # A dollar sign would begin mathematics.
    lines = "\n".join(filter(None, (prompt, "  ·  ".join(filter(None, facts)))))
    part.suptitle(lines.replace("$", r"\$"), x=0.01, ha="left", fontsize=9.5, color=INK, family=families)


def _draw_densities(axes: Axes, bar: Axes, data: ReportData) -> None:
    # Layers that are dense or did not run are no part of the colours' span.
    densities = np.ma.masked_where(data.dense | np.isnan(data.densities), data.densities)
    axes.set_title("Blocks kept, mean over heads")
    axes.set(ylabel="layer")
    axes.tick_params(labelbottom=False)
    _whole_numbers(axes)
    axes.set_facecolor("white")
    low, high = (densities.min(), densities.max()) if densities.count() else (0.0, 1.0)
    if high - low < LEAST_SPAN:
        middle = min(max((low + high) / 2, LEAST_SPAN / 2), 1 - LEAST_SPAN / 2)
        low, high = middle - LEAST_SPAN / 2, middle + LEAST_SPAN / 2
    image = axes.imshow(densities, cmap=DENSITIES, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    ran, handles = ~np.isnan(data.densities), []
    if (data.dense & ran).any():
        axes.imshow(np.ma.masked_equal(data.dense & ran, False), cmap=ListedColormap((GREY,)), aspect="auto")
        handles.append(Patch(color=GREY, label="dense"))
    if not ran.all():
        handles.append(Patch(facecolor="white", edgecolor=FAINT, label="left out by the cache"))
    if handles:
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 2}
        axes.legend(handles=handles, frameon=False, **place)
    if not densities.count():
        bar.axis("off")
        return
    axes.figure.colorbar(image, cax=bar, format=PercentFormatter(1, decimals=0 if high - low > 0.05 else 1))
    bar.tick_params(length=0)
    bar.spines[:].set_visible(False)


def _draw_by_step(axes: Axes, data: ReportData) -> None:
    steps = np.arange(len(data.by_step))
    axes.set(xlabel="step", ylabel="kept")
    marker = "o" if len(steps) <= 30 else None
    whole, part = steps[data.complete], steps[~data.complete & np.isfinite(data.by_step)]
    band = {"color": PALE, "alpha": 0.45, "lw": 0, "label": "any head of a sparse layer"}
    axes.fill_between(whole, data.low[whole], data.high[whole], **band)
    axes.plot(whole, data.by_step[whole], color=BLUE, lw=1.6, marker=marker, ms=3, label="mean of all layers")
    if len(part):
        axes.plot(part, data.by_step[part], "o", color=BLUE, mfc="white", ms=4, label="mean of the layers that ran")
    top = np.nanmax(np.fmax(data.high, data.by_step)) if np.isfinite(data.by_step).any() else 1
    axes.set_ylim(0, min(1.02, top * 1.15))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=RULE, lw=0.6)
    axes.legend(loc="lower left", ncols=3, frameon=False, fontsize=8)


def _draw_seconds(axes: Axes, title: str, seconds: Mapping[str, float], colours: Mapping[str, str]) -> None:
    """A bar for each, with its share of all."""
    axes.set_title(title)
    names, total = list(seconds), sum(seconds.values())
    axes.barh(names, list(seconds.values()), color=[colours.get(name, FAINT) for name in names], height=0.62)
    # Room for the text beside the longest bar; more than nothing, lest the axis have no length.
    axes.set(xlim=(0, max([*seconds.values(), 1e-9]) * 1.6), xticks=[])
    # So many places at least, lest a single bar fills the panel.
    axes.set_ylim(max(len(names), 4) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    for row, value in enumerate(seconds.values()):
        axes.text(value, row, f"  {_time(value)}, {value / total:.0%}" if total else "", va="center", fontsize=8.5)


def _draw_parts(axes: Axes, seconds: Mapping[str, float]) -> None:
    axes.set_title("Time of all steps")
    if not seconds:
        axes.axis("off")
        axes.text(0, 0.9, "not measured", va="top", color=FAINT, transform=axes.transAxes)
        return
    _draw_seconds(axes, "Time of all steps", {name: seconds[name] for name in PARTS}, PARTS)


def _draw_examples(part: SubFigure, run: Event, data: ReportData) -> None:
    """The window first, then the heads; blocks that are in the window too have a colour of their own."""
    step = data.examples[0].step
    title = f"Masks of step {step}: row by row, the key blocks that a query block keeps"
    part.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold", color=INK)
    before = [] if data.window is None else [None]
    panels: list[MaskExample | None] = [*before, *data.examples]
    # Few panels are not to be as large as the page.
    all_axes = part.subplots(1, max(len(panels), 6))
    for axes in all_axes[len(panels) :]:
        axes.axis("off")
    for axes, example in zip(all_axes, panels):
        _draw_mask(axes, run, data.window, example)
    handles = [Patch(color=BLUE, label="chosen by content")]
    handles += [Patch(color=AMBER, label="in the window")] if data.window is not None else []
    part.legend(handles=handles, loc="upper right", ncols=2, frameon=False, fontsize=8.5)


def _draw_mask(axes: Axes, run: Event, window: np.ndarray | None, example: MaskExample | None) -> None:
    blocks = window if example is None else example.blocks
    assert blocks is not None, "a panel shows a head or the window"
    shade = blocks.astype(np.uint8)
    if window is not None:
        shade = np.where(blocks & window, 2, shade)
    # Of several blocks that fall on one dot, their colours are mixed.
    axes.imshow(BLOCKS(shade), interpolation="antialiased", interpolation_stage="rgba")
    axes.set(xticks=[], yticks=[])
    if example is None:
        axes.set_title(f"window {'x'.join(map(str, run['window']))}", fontsize=8.5, fontweight="normal")
        axes.set_xlabel(f"{blocks.mean():.1%} of all blocks", fontsize=8.5)
        return
    head = "all heads" if example.head is None else f"head {example.head}"
    axes.set_title(f"layer {example.layer}, {head}", fontsize=8.5, fontweight="normal")
    axes.set_xlabel(f"{example.density:.1%} kept", fontsize=8.5)


def _whole_numbers(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
