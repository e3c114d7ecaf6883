"""The frontier of runs: quality against cost."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from explore.figures.axes import LINE, legend
from explore.figures.base import EVEN, README_HEIGHT, README_WIDTH, RunFigure, family_styles
from explore.figures.labels import label_front, label_room
from explore.figures.runs import dress_runs, finished, is_log_x, one_axes
from explore.frontier import pareto_front
from explore.quantities import quantity


def frontier_table(runs: pd.DataFrame, x: str = "flops_run", y: str = "val_bpb") -> pd.DataFrame:
    """What a frontier figure draws: the finished runs with both values, by rising cost.

    Args:
        runs: a table as `load_runs` gives it; where it has a `status`, only finished runs are drawn.
        x: the cost column.
        y: the quality column. Of both, lower is better unless `explore.quantities` declares that higher is.

    Returns:
        Columns run, family, pattern, `x`, `y` and on_front; and `floor`, the score of an n-gram model of the same
        tokens, where `runs` tell it.

    Raises:
        ValueError: a column is missing.
    """
    table = finished(runs, x, y)
    if (floor := f"ngram_{y}") in runs:
        table["floor"] = table["run"].map(runs.drop_duplicates("run").set_index("run")[floor].astype("float64"))
    table["on_front"] = pareto_front(table, x, y)
    order = table.assign(cost=quantity(x).sign * table[x], error=quantity(y).sign * table[y])
    return table.loc[order.sort_values(["cost", "error", "run"]).index].reset_index(drop=True)


def draw_frontier(table: pd.DataFrame, ax: Axes, x: str, y: str, *, font_pt: float = 8.0) -> None:
    """Draws a frontier table: runs by family, the front as a step line, its members solid and labelled by pattern.

    Args:
        table: from `frontier_table`.
        x: the cost column.
        y: the quality column.
        font_pt: size of the text in points; the markers follow it.
    """
    front = table[table["on_front"]]
    floor = table.dropna(subset="floor") if "floor" in table else table.iloc[:0].assign(floor=[])
    drawn = pd.concat([table[[x, y]], floor[[x, "floor"]].rename(columns={"floor": y})])
    signs = quantity(x).sign, quantity(y).sign
    room = label_room(ax, table, x, signs[0], font_pt, log=is_log_x(table, x))
    # Labels are on the better side of both axes.
    margins_x = (room, 0.05) if signs[0] > 0 else (0.05, room)
    margins_y = (0.2, 0.06) if signs[1] > 0 else (0.06, 0.2)
    if not dress_runs(ax, drawn, x, y, font_pt, margins_x, margins_y):
        return
    ax.plot(front[x], front[y], drawstyle="steps-post", color=LINE, lw=0.11 * font_pt, zorder=2, label="Pareto front")
    handles = []
    for family, style in family_styles(table["family"]).items():
        size = 0.62 * font_pt * EVEN.get(style.marker, 1.0)
        for on_front in (False, True):
            rows = table[(table["family"] == family) & (table["on_front"] == on_front)]
            ax.scatter(
                rows[x], rows[y], s=size**2, marker=style.marker, facecolor=style.color if on_front else style.light,
                edgecolor=style.color, linewidth=0.08 * font_pt, zorder=4 if on_front else 3,
                label=family if on_front else f"{family}, off the front",
            )  # fmt: skip
        handles.append(Line2D([], [], marker=style.marker, ls="", ms=size, color=style.color, label=family))
    if len(front) > 1:
        handles.append(Line2D([], [], color=LINE, lw=0.11 * font_pt, label="Pareto front"))
    if len(floor):
        ax.plot(floor[x], floor["floor"], ls=":", color=LINE, lw=0.15 * font_pt, zorder=1)
        handles.append(Line2D([], [], ls=":", color=LINE, lw=0.15 * font_pt, label="n-gram model"))
    legend(ax, handles, font_pt)
    label_front(ax, table, x, y, signs, font_pt)


def plot_frontier(
    runs: pd.DataFrame,
    x: str = "flops_run",
    y: str = "val_bpb",
    *,
    width: float = README_WIDTH,
    height: float = README_HEIGHT,
    title: str | None = None,
) -> RunFigure:
    """The runs' quality against their cost, with the Pareto front.

    Args:
        width: inches; text is 7 points up to a paper's column and 8.5 points on a page.
        height: inches.
        title: drawn above the axes; there is none unless asked for.
    """
    table = frontier_table(runs, x, y)
    figure, ax, font_pt = one_axes(table, x, y, width, height, title)
    draw_frontier(table, ax, x, y, font_pt=font_pt)
    return figure
