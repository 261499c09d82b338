"""The picture of a calibration, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from wan.files.atomic import atomic_path
from wan.observe.report_figure import AMBER, BLUE, DENSITIES, FAINT, GREY, RULE, STYLE, TEAL
from wan.tools.calibrate_attention.table import Keep, Table, solve_keep
from wan.tools.calibrate_attention.timing import VideoTime

SIZE, DPI = (12.0, 7.0), 110
# Of the curve of errors by share.
POINTS = 12


def draw(path: Path, title: str, time: VideoTime, keep: Sequence[Keep]) -> None:
    """Write a PNG: the profile, how much layers matter, what shares cost here, and error by share."""
    with rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        figure.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", fontsize=9.5)
        axes = figure.subplots(2, 2, width_ratios=(3, 2))
        _draw_profile(figure, axes[0, 0], time.table, keep)
        _draw_errors(figure, axes[1, 0], time.table)
        _draw_cost(axes[0, 1], time)
        _draw_budgets(axes[1, 1], time.table, keep)
        with atomic_path(path, "choose another --plot") as partial:
            figure.savefig(partial, dpi=DPI, format="png")


def _draw_profile(figure: Figure, axes: Axes, table: Table, keep: Sequence[Keep]) -> None:
    axes.set_title("Blocks that the profile keeps")
    image = axes.imshow(np.array(keep), cmap=DENSITIES, norm=LogNorm(table.shares[0] / 2, 1), aspect="auto")
    ticks = [*table.shares, 1.0]
    bar = figure.colorbar(image, ax=axes, ticks=ticks)
    bar.ax.set_yticks(ticks, ["dense" if share == 1 else f"{share:.0%}" for share in ticks])
    bar.ax.minorticks_off()
    _name_axes(axes, table)


def _draw_errors(figure: Figure, axes: Axes, table: Table) -> None:
    share = len(table.shares) // 2
    axes.set_title(f"Error of the output, one layer at {table.shares[share]:.0%} and all others dense")
    errors = np.sqrt([[layer[share] for layer in stretch] for stretch in table.errors])
    least = max(errors[errors > 0].min(initial=1.0), 1e-9)
    image = axes.imshow(errors, cmap="YlOrBr", norm=LogNorm(least, max(errors.max(), 2 * least)), aspect="auto")
    figure.colorbar(image, ax=axes)
    _name_axes(axes, table)


def _name_axes(axes: Axes, table: Table) -> None:
    axes.set(xlabel="layer", ylabel="steps")
    axes.set_yticks(range(len(table.spans)), [f"{span.begin} to {span.end - 1}" for span in table.spans])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _draw_cost(axes: Axes, time: VideoTime) -> None:
    axes.set_title("A block's time here")
    shares = [*time.table.shares, 1.0]
    times = [time.cost.block(time.cost.layers - 1, share) for share in shares]
    names = ["dense" if share == 1 else f"{share:.0%}" for share in shares]
    # Those that save nothing stand out.
    colours = [GREY if share == 1 else BLUE if ms < times[-1] else AMBER for share, ms in zip(shares, times)]
    axes.barh(names, times, color=colours, height=0.62)
    axes.set(xlim=(0, max(times) * 1.3), xticks=[])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    for row, ms in enumerate(times):
        axes.text(ms, row, f"  {ms:.3g} ms", va="center", fontsize=8.5)


def _draw_budgets(axes: Axes, table: Table, keep: Sequence[Keep]) -> None:
    axes.set_title("Error of the output, predicted")
    shares = np.round(np.geomspace(table.shares[0], table.shares[-1], POINTS), 3).clip(table.shares[0])
    uniform = [table.predicted(table.uniform(share)) for share in shares]
    solved = [table.predicted(solve_keep(table, share)) for share in shares]
    axes.plot(shares, uniform, color=FAINT, label="one share for all layers and steps")
    axes.plot(shares, solved, color=BLUE, marker="o", ms=3, label="profiles")
    axes.plot(table.mean_keep(keep), table.predicted(keep), "o", color=TEAL, label="this one")
    axes.set(xlabel="blocks kept, mean", xscale="log", yscale="log")
    axes.set_xticks(table.shares)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=RULE, lw=0.6)
    axes.legend(frameon=False, fontsize=8)
