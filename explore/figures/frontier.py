"""The frontier of runs: quality against cost."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from explore.figures.axes import LINE, legend
from explore.figures.base import EVEN, README_HEIGHT, README_WIDTH, RunFigure, family_styles
from explore.figures.labels import LABELLING, label_front, label_room, point_labels
from explore.figures.runs import check_table, dress_runs, finished, is_log_x, named, one_axes
from explore.frontier import HALF_WIDTH, pareto_front, seed_groups, seed_means
from explore.quantities import PARENTS, quantity


def frontier_table(
    runs: pd.DataFrame, x: str = "flops_run", y: str = "val_bpb", *, by_seed: bool = False
) -> pd.DataFrame:
    """Table for a frontier figure: the finished runs with both values, by rising cost.

    Args:
        runs: a table as `load_runs` gives it, or any with the columns `x` and `y`; if it has a `status`, only finished
            runs are drawn.
        x: the cost column.
        y: the quality column. For both columns lower is better, unless `explore.quantities` declares the opposite.
        by_seed: whether each run is a row; otherwise runs that differ only in their seed are averaged.

    Returns:
        Columns run, family, pattern, `x`, `y`, `label` and on_front; `half_width` of the 95% interval of a mean, if
        there are several seeds; `floor`, the score of an n-gram model of the same tokens, if `runs` has it; and
        `parent`, the `run` of the row from which this one was cut, quantised or distilled, if there is one.

    Raises:
        ValueError: a column is missing.
    """
    half, floor = HALF_WIDTH.format(y), f"ngram_{y}"
    check_table(runs, x, y)
    runs = named(runs).reset_index(drop=True)
    # The row in which each run is drawn: its own, or that of the first run of its group.
    row_of = runs["run"] if by_seed else runs["run"].groupby(seed_groups(runs)).transform("first")
    drawn_in = dict(zip(runs["run"], row_of, strict=True))
    table = finished(runs if by_seed else seed_means(runs), x, y, (*LABELLING, half, floor, *PARENTS))
    parent = table.reindex(columns=list(PARENTS)).bfill(axis="columns").iloc[:, 0].map(drawn_in)
    table["parent"] = parent.where(parent.isin(table["run"]))
    table["on_front"] = pareto_front(table, x, y)
    table["label"] = point_labels(table[table["on_front"]]).reindex(table.index).fillna(table["pattern"])
    table = table.rename(columns={half: "half_width", floor: "floor"})
    kept = [name for name in ("half_width", "floor", "parent") if name in table and table[name].notna().any()]
    table = table[["run", "family", "pattern", x, y, "label", *kept, "on_front"]]
    order = table.assign(cost=quantity(x).sign * table[x], error=quantity(y).sign * table[y])
    return table.loc[order.sort_values(["cost", "error", "run"]).index].reset_index(drop=True)


def draw_frontier(table: pd.DataFrame, ax: Axes, x: str, y: str, *, font_pt: float = 8.0) -> None:
    """Draws a frontier table: runs by family, the front as a step line, its members solid and labelled.

    Args:
        table: from `frontier_table`.
        x: the cost column.
        y: the quality column.
        font_pt: size of the text in points; the markers follow it.
    """
    front = table[table["on_front"]]
    floor = table.dropna(subset="floor") if "floor" in table else table.iloc[:0].assign(floor=[])
    half = table["half_width"].fillna(0.0) if "half_width" in table else 0.0
    ends = [table[[x, y]].assign(**{y: table[y] + sign * half}) for sign in (-1, 1)]
    drawn = pd.concat([*ends, floor[[x, "floor"]].rename(columns={"floor": y})])
    signs = quantity(x).sign, quantity(y).sign
    room = label_room(ax, table, x, signs[0], font_pt, log=is_log_x(table, x))
    # Labels go on the better side of both axes.
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
            if "half_width" in table:
                ax.errorbar(
                    rows[x], rows[y], rows["half_width"], fmt="none", ecolor=style.color, elinewidth=0.1 * font_pt,
                    capsize=0.2 * font_pt, zorder=2.5,
                )  # fmt: skip
        handles.append(Line2D([], [], marker=style.marker, ls="", ms=size, color=style.color, label=family))
    if "parent" in table:
        drawn_at = table.set_index("run")[[x, y]]
        for child in table.dropna(subset="parent").itertuples():
            pair = drawn_at.loc[[child.parent, child.run]]
            ax.plot(pair[x], pair[y], color=LINE, lw=0.08 * font_pt, ls="--", alpha=0.6, zorder=1.5)
        handles.append(Line2D([], [], color=LINE, lw=0.08 * font_pt, ls="--", alpha=0.6, label="parent and child"))
    if len(front) > 1:
        handles.append(Line2D([], [], color=LINE, lw=0.11 * font_pt, label="Pareto front"))
    if len(floor):
        ax.plot(floor[x], floor["floor"], ls=":", color=LINE, lw=0.15 * font_pt, zorder=1)
        handles.append(Line2D([], [], ls=":", color=LINE, lw=0.15 * font_pt, label="n-gram model"))
    if "half_width" in table:
        handles.append(Line2D([], [], marker="|", ls="", color=LINE, ms=font_pt, label="95% interval over seeds"))
    legend(ax, handles, font_pt)
    label_front(ax, table, x, y, signs, font_pt)


def plot_frontier(
    runs: pd.DataFrame,
    x: str = "flops_run",
    y: str = "val_bpb",
    *,
    by_seed: bool = False,
    width: float = README_WIDTH,
    height: float = README_HEIGHT,
    title: str | None = None,
) -> RunFigure:
    """Plots the quality of runs against their cost, with the Pareto front.

    Args:
        runs: any table with the columns `x` and `y`, such as `load_runs` gives.
        by_seed: whether each run is a point; otherwise runs that differ only in their seed are a mean with its
            interval.
        width: inches; text is 7 points up to a paper's column and 8.5 points on a page.
        height: inches.
        title: drawn above the axes if given.
    """
    table = frontier_table(runs, x, y, by_seed=by_seed)
    figure, ax, font_pt = one_axes(table, x, y, width, height, title)
    draw_frontier(table, ax, x, y, font_pt=font_pt)
    return figure
