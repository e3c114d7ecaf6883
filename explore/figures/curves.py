"""Learning curves of runs."""

from __future__ import annotations

from typing import Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from explore.figures.axes import legend
from explore.figures.base import README_HEIGHT, README_WIDTH, RunFigure, family_styles
from explore.figures.panels import line_styles
from explore.figures.runs import dress_runs, finished, one_axes


def curves_table(metrics: pd.DataFrame, x: str = "flops_run", y: str = "val_bpb") -> pd.DataFrame:
    """Table for learning curves: the rows with both values, by run and rising `x`.

    Args:
        metrics: a table as `load_metrics` gives it.

    Returns:
        Columns run, family, pattern, `x` and `y`.

    Raises:
        ValueError: a column is missing.
    """
    return finished(metrics, x, y).sort_values(["run", x], ignore_index=True, kind="stable")


def draw_curves(
    table: pd.DataFrame, ax: Axes, x: str, y: str, *, by: Literal["family", "run"] = "family", font_pt: float = 8.0
) -> None:
    """Draws a table of learning curves: one line per run in the colour of its family, with a marker at its end.

    Args:
        table: from `curves_table`.
        x: the horizontal column.
        y: the vertical column.
        by: what colours and the legend distinguish: families or runs.
        font_pt: size of the text in points; lines and markers follow it.
    """
    if not dress_runs(ax, table, x, y, font_pt):
        return
    if by == "run":
        _draw_runs(table, ax, x, y, font_pt)
        return
    handles = []
    for family, style in family_styles(table["family"]).items():
        look = {
            "color": style.color,
            "marker": style.marker,
            "ms": 0.55 * font_pt,
            "mec": "white",
            "mew": 0.06 * font_pt,
        }
        for run, rows in table[table["family"] == family].groupby("run", sort=True):
            ax.plot(rows[x], rows[y], lw=0.12 * font_pt, markevery=[-1], label=str(run), **look)  # type: ignore[arg-type]
        handles.append(Line2D([], [], lw=0.12 * font_pt, label=family, **look))  # type: ignore[arg-type]
    legend(ax, handles, font_pt)


def _draw_runs(table: pd.DataFrame, ax: Axes, x: str, y: str, font_pt: float) -> None:
    """Draws one line per run, each in its own style."""
    looks = {name: style.look(font_pt) for name, style in line_styles(table["run"]).items()}
    for name, look in looks.items():
        rows = table[table["run"] == name]
        ax.plot(rows[x], rows[y], markevery=[-1], label=name, **look)
    legend(ax, [Line2D([], [], label=name, **look) for name, look in looks.items()], font_pt)


def plot_curves(
    metrics: pd.DataFrame,
    x: str = "flops_run",
    y: str = "val_bpb",
    *,
    by: Literal["family", "run"] = "family",
    width: float = README_WIDTH,
    height: float = README_HEIGHT,
    title: str | None = None,
) -> RunFigure:
    """Plots learning curves, coloured by family or by run; other arguments as in `plot_frontier`."""
    table = curves_table(metrics, x, y)
    figure, ax, font_pt = one_axes(table, x, y, width, height, title)
    draw_curves(table, ax, x, y, by=by, font_pt=font_pt)
    return figure
