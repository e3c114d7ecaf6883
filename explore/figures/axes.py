"""Style of axes: scales, ticks, labels, grid and legend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

INK, LINE, GRID, BAND = "0.15", "0.45", "0.92", "0.96"
_TICKS = ((1,), (1, 3), (1, 2, 5), (1, 2, 4), (1, 2, 4, 6, 8), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8))


def dress(ax: Axes, x_label: str, y_label: str, font_pt: float) -> None:
    """Sets labels, spines, ticks and grid of the axes."""
    ax.set_xlabel(x_label, fontsize=font_pt, color=INK)
    ax.set_ylabel(y_label, fontsize=font_pt, color=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set(color=LINE, linewidth=0.6)
    ax.tick_params(which="both", labelsize=font_pt - 0.5, color=LINE, labelcolor=INK, width=0.6, length=2.5)
    ax.tick_params(which="minor", length=1.5)
    ax.set_axisbelow(True)
    ax.grid(color=GRID, linewidth=0.6)


def draw_message(ax: Axes, message: str, font_pt: float) -> None:
    """Writes a message in the middle of empty axes."""
    ax.grid(visible=False)
    ax.set(xticks=[], yticks=[])
    ax.text(0.5, 0.5, message, transform=ax.transAxes, ha="center", va="center", fontsize=font_pt + 1, color=LINE)


def span(values: pd.Series[float]) -> tuple[float, float]:
    """The range of the values, at least a hundredth of their size."""
    low, high = float(values.min()), float(values.max())
    half = max(high - low, 0.01 * max(abs(low), abs(high)), 1e-9) / 2
    return (low + high) / 2 - half, (low + high) / 2 + half


def is_log(costs: pd.Series[float]) -> bool:
    """Whether all costs are positive; the KV cache of an attention-free model, for example, is zero."""
    return bool((costs > 0).all())


def log_axis(
    ax: Axes, values: pd.Series[float], below: float, above: float = 0.05, *, which: Literal["x", "y"] = "x"
) -> None:
    """Makes a log axis that spans at least a factor of two and has at least three labelled ticks.

    Args:
        below: margin before the values, as a fraction of their span.
        above: margin after the values, as a fraction of their span.
    """
    low, high = float(np.log10(values.min())), float(np.log10(values.max()))
    middle, width = (low + high) / 2, max(high - low, math.log10(2))
    limits = (10 ** (middle - (0.5 + below) * width), 10 ** (middle + (0.5 + above) * width))
    ax.set(**{f"{which}scale": "log", f"{which}lim": limits})
    ticks_of_ten(ax.xaxis if which == "x" else ax.yaxis, power_of_ten)


def log_limits(values: pd.Series[float], room: float = 0.05) -> tuple[float, float]:
    """Limits of a log axis around values, at least a factor of two apart; `room` is a fraction of their span."""
    low, high = float(np.log2(values.min())), float(np.log2(values.max()))
    middle, half = (low + high) / 2, (0.5 + room) * max(high - low, 1.0)
    return 2.0 ** (middle - half), 2.0 ** (middle + half)


def ticks_of_ten(axis: Axis, text: Callable[[float], str]) -> None:
    """Sets the ticks of a log axis within its limits, with at least three labels."""
    start, end = axis.get_view_interval()
    ticks: list[float] = []
    for steps in _TICKS:
        decades = range(math.floor(math.log10(start)), math.ceil(math.log10(end)) + 1)
        ticks = [tick for decade in decades for step in steps if start <= (tick := step * 10.0**decade) <= end]
        if len(ticks) >= 3:
            break
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_locator(LogLocator(subs=range(2, 10)))
    axis.set_minor_formatter(NullFormatter())


def ticks_of_two(axis: Axis, text: Callable[[float], str], at_most: int = 8) -> None:
    """Sets the ticks of a log axis at powers of two within its limits, evenly spaced."""
    start, end = np.log2(axis.get_view_interval())
    first, last = math.ceil(start - 1e-9), math.floor(end + 1e-9)
    step = next(n for n in (1, 2, 3, 5, 10, 20, 40, 80, 160, 320) if (last - first) // n < at_most)
    axis.set_major_locator(FixedLocator([2.0**i for i in range(step * math.ceil(first / step), last + 1, step)]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_locator(NullLocator())


def power_of_ten(value: float) -> str:
    """Formats a number as a tick label: plain below ten thousand, else with a power of ten."""
    exponent = int(np.floor(np.log10(value) + 1e-9))
    factor = f"{value / 10.0**exponent:.4g}"
    if 0 <= exponent < 4:
        return f"{value:.4g}"
    return rf"$10^{{{exponent}}}$" if factor == "1" else rf"${factor}\times10^{{{exponent}}}$"


def rows_of_names(ax: Axes, names: Sequence[str]) -> None:
    """Writes names beside the rows of the axes, the first at the top."""
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")


def legend(ax: Axes, handles: list[Line2D], font_pt: float) -> None:
    """Draws a legend above the axes, in as many even columns as fit."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    for rows in range(1, len(handles) + 1):
        box = ax.legend(
            handles=handles, ncols=math.ceil(len(handles) / rows), loc="lower left", bbox_to_anchor=(0, 1.02),
            fontsize=font_pt - 0.5, frameon=False, borderaxespad=0, borderpad=0.2, handlelength=1.3, handletextpad=0.4,
            columnspacing=1.0, labelcolor=INK,
        )  # fmt: skip
        box.set_in_layout(False)  # while it may be wider than the axes, which would squeeze them
        figure.draw_without_rendering()
        axes, width = ax.get_window_extent(), box.get_window_extent().width
        box.set_in_layout(True)
        if width <= axes.width:
            return
        if width <= axes.x1 - ax.yaxis.label.get_window_extent().x0:  # begins above the label of the y axis
            box.set_loc("lower right")
            box.set_bbox_to_anchor((1, 1.02), ax.transAxes)
            return
