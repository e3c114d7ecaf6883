"""Figure of a swept budget: predicted and measured quality of the best child under each budget."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from explore.figures.axes import LINE, draw_message, dress, is_log, legend, log_axis
from explore.figures.base import README_WIDTH, RunFigure, text_pt
from explore.figures.panels import line_styles
from explore.quantities import quantity

if TYPE_CHECKING:
    from explore.compress.replacing import Measured

PREDICTED, MEASURED = "predicted, summed", "measured"


def draw_divergences(table: pd.DataFrame, name: str, ax: Axes, *, font_pt: float = 8.0) -> None:
    """Draws the predicted and the measured divergence from the parent.

    Args:
        table: from `explore.compress.assembling.sweep`.
        name: name of the swept measure.
        font_pt: size of the text in points.
    """
    dress(ax, quantity(name).label, "KL divergence (nats per token)", font_pt)
    if table.empty:
        draw_message(ax, "nothing to show", font_pt)
        return
    handles = []
    styles = line_styles([PREDICTED, MEASURED])
    shown = pd.concat([table["predicted"], table["kl"]])
    for label, column in ((PREDICTED, "predicted"), (MEASURED, "kl")):
        (line,) = ax.plot(table[name], table[column], **styles[label].look(font_pt), label=label)
        handles.append(line)
    if is_log(shown):
        log_axis(ax, shown, 0.1, which="y")
    legend(ax, handles, font_pt)


def _dress_x(ax: Axes, name: str) -> None:
    """Sets a few ticks of a linear axis in whole units; bytes use powers of 1024."""
    low, high = ax.get_xlim()
    base = 1024 if name.endswith("bytes") else 1000
    unit = float(base ** max(0, math.floor(math.log(max(high, 1.0), base))))
    ticks = [tick * unit for tick in MaxNLocator(5).tick_values(max(low, 0.0) / unit, high / unit)]
    ax.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(name).text(value)))
    ax.set_xlim(low, high)


def draw_quality(
    table: pd.DataFrame, name: str, y: str, parent: tuple[float, float], ax: Axes, *, font_pt: float = 8.0
) -> None:
    """Draws the quality of the children and of the parent.

    Args:
        y: the quality column.
        parent: cost and quality of the parent.
    """
    dress(ax, quantity(name).label, quantity(y).label, font_pt)
    if table.empty:
        draw_message(ax, "nothing to show", font_pt)
        return
    (children,) = ax.plot(table[name], table[y], **line_styles([PREDICTED, MEASURED])[MEASURED].look(font_pt))
    ax.axhline(parent[1], ls=":", color=LINE, lw=0.15 * font_pt, zorder=1)
    ax.plot(*parent, marker="*", ms=font_pt, color=LINE, ls="", zorder=3)
    children.set_label("children, not trained further")
    legend(ax, [children, Line2D([], [], marker="*", ms=font_pt, color=LINE, ls=":", label="parent")], font_pt)


def plot_tradeoff(
    table: pd.DataFrame,
    name: str,
    parent: Measured,
    parent_cost: float,
    run: str,
    *,
    width: float = README_WIDTH,
    height: float = 2.9,
    title: str | None = None,
) -> RunFigure:
    """Plots predicted and measured divergence, and the quality of the children, against a swept budget.

    Args:
        table: from `explore.compress.assembling.sweep`.
        name: name of the swept measure.
        parent: scores of the parent on the same text.
        parent_cost: value of the measure for the parent.
        run: name of the parent.
        width: inches.
        height: inches.
        title: drawn above the axes if given.
    """
    font_pt = text_pt(width)
    figure = RunFigure(width, height, title or f"Children of {run} by {name}", [run])
    if title:
        figure.suptitle(title, fontsize=font_pt + 1)
    left, right = figure.subplots(1, 2, sharex=True)
    draw_divergences(table, name, left, font_pt=font_pt)
    y = "val_loss" if parent.val_bpb is None else "val_bpb"
    draw_quality(table, name, y, (parent_cost, getattr(parent, y)), right, font_pt=font_pt)
    if not table.empty:
        _dress_x(right, name)
    return figure
