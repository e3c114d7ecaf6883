"""Quality of quantised runs against bits per parameter, with the original run for comparison."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from explore.figures.axes import LINE, legend
from explore.figures.base import COLOR_ORDER, MARKERS, README_HEIGHT, README_WIDTH, RunFigure
from explore.figures.runs import dress_runs, finished, one_axes
from explore.frontier.columns import check_columns

X = "bits_per_element"


def bits_table(runs: pd.DataFrame, parent: str, y: str = "test_bpb") -> pd.DataFrame:
    """Table for the figure: the finished children of a run, by rising bits.

    Args:
        runs: a table as `load_runs` gives it, with the parent.
        parent: folder name of the run that was quantised.
        y: the quality column.

    Returns:
        Columns run, family, pattern, bits_per_element, `y`, `scales`, and `parent`: the quality of the parent.

    Raises:
        ValueError: a column is missing.
    """
    check_columns(runs, ["run", "quantized_from", "scales", X, y], "runs")
    table = finished(runs[runs["quantized_from"].eq(parent).fillna(False).astype(bool)], X, y)
    table["scales"] = table["run"].map(runs.drop_duplicates("run").set_index("run")["scales"]).astype("str")
    trained = runs.loc[runs["run"] == parent, y]
    table["parent"] = float(trained.iloc[0]) if len(trained) else float("nan")
    return table.sort_values([X, y, "run"], ignore_index=True)


def _quality(runs: pd.DataFrame, parent: str) -> str:
    """The quality column of a run and its children."""
    check_columns(runs, ["run", "quantized_from"], "runs")
    shown = runs[(runs["run"] == parent) | runs["quantized_from"].eq(parent).fillna(False).astype(bool)]
    has = [y for y in ("test_bpb", "recall") if y in shown and shown[y].notna().any()]
    return has[0] if has else "test_bpb"


def draw_bits(table: pd.DataFrame, ax: Axes, y: str = "test_bpb", *, font_pt: float = 8.0) -> None:
    """Draws a table of quantised runs: one line per criterion for scales, and one for the parent."""
    shown = pd.concat([table[[X, y]], table[[X, "parent"]].rename(columns={"parent": y}).dropna()])
    if not dress_runs(ax, shown, X, y, font_pt):
        return
    handles = []
    palette = sns.color_palette("colorblind")
    for i, (scales, rows) in enumerate(table.groupby("scales", sort=True)):
        style = {
            "color": palette[COLOR_ORDER[i % len(COLOR_ORDER)]], "marker": MARKERS[i % len(MARKERS)],
            "ms": 0.62 * font_pt, "lw": 0.11 * font_pt, "label": f"scales by {str(scales).replace('_', ' ')}",
        }  # fmt: skip
        ax.plot(rows[X], rows[y], zorder=3, **style)
        handles.append(Line2D([], [], **style))
    parent = table["parent"].dropna()
    if len(parent):
        style = {"ls": ":", "color": LINE, "lw": 0.15 * font_pt, "label": "before quantisation"}
        ax.axhline(parent.iloc[0], zorder=1, **style)
        handles.append(Line2D([], [], **style))
    legend(ax, handles, font_pt)


def plot_bits(
    runs: pd.DataFrame,
    parent: str,
    y: str | None = None,
    *,
    width: float = README_WIDTH,
    height: float = README_HEIGHT,
    title: str | None = None,
) -> RunFigure:
    """Plots the quality of the children of a run against their bits per parameter.

    Args:
        parent: folder name of the run that was quantised.
        y: the quality column; None chooses bits per byte, or recall if the runs have only that.
        width: inches.
        height: inches.
        title: drawn above the axes if given.
    """
    y = y or _quality(runs, parent)
    table = bits_table(runs, parent, y)
    figure, ax, font_pt = one_axes(table, X, y, width, height, title)
    draw_bits(table, ax, y, font_pt=font_pt)
    return figure
