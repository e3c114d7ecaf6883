"""Figures of plans: memory per pipeline rank, and throughput of the searched layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from explore.figures.axes import INK, LINE, draw_message, dress, legend
from explore.figures.base import README_WIDTH, Color, RunFigure, text_pt
from explore.figures.panels import line_styles

if TYPE_CHECKING:
    from explore.plan import Found, Plan

MEMORY: Mapping[str, Color] = {
    "weights": (0.00, 0.45, 0.70),
    "grads": (0.34, 0.71, 0.91),
    "optimizer": (0.90, 0.62, 0.00),
    "activations": (0.00, 0.62, 0.45),
}
"""Kinds of memory of a rank, from the bottom of a bar."""

MOST_LABELS = 24
"""Most ranks whose numbers fit below an axis."""


def plan_memory_table(plans: Mapping[str, Plan]) -> pd.DataFrame:
    """Table for the figure of memory.

    Returns:
        Columns model, rank (of the pipeline), kind (of `MEMORY`), gib and capacity_gib.
    """
    rows = [
        (name, rank, kind, parts[kind], plan.capacity / 2**30)
        for name, plan in plans.items()
        for rank, parts in enumerate(plan.ranks())
        for kind in MEMORY
    ]
    return pd.DataFrame(rows, columns=["model", "rank", "kind", "gib", "capacity_gib"])


def draw_plan_memory(table: pd.DataFrame, ax: Axes, *, font_pt: float = 8.0) -> None:
    """Draws a bar for each rank of each model, stacked by kind, and the capacity as a line above them.

    Args:
        table: from `plan_memory_table`.
        font_pt: size of the text in points.
    """
    dress(ax, "Rank of the pipeline", "Memory (GiB)", font_pt)
    if table.empty:
        draw_message(ax, "nothing to show", font_pt)
        return
    ax.grid(visible=False, axis="x")
    ticks: list[tuple[float, str]] = []
    start, most = 0.0, float(table["capacity_gib"].max())
    for name, of_model in table.groupby("model", sort=False):
        n_ranks = int(of_model["rank"].max()) + 1
        height = pd.Series(0.0, index=range(n_ranks))
        for kind, color in MEMORY.items():
            gib = of_model[of_model["kind"] == kind].set_index("rank")["gib"]
            ax.bar(start + height.index, gib, bottom=height, width=0.8, color=color, edgecolor="white", linewidth=0.3)
            height = height + gib
        capacity = float(of_model["capacity_gib"].iloc[0])
        ax.plot([start - 0.5, start + n_ranks - 0.5], [capacity, capacity], color=INK, lw=0.9, ls=(0, (4, 2)))
        most = max(most, float(height.max()))
        if table["model"].nunique() > 1:
            ax.annotate(str(name), (start + (n_ranks - 1) / 2, 1.0), (0, 2), xycoords=("data", "axes fraction"),
                        textcoords="offset points", ha="center", va="bottom", fontsize=font_pt, color=INK)  # fmt: skip
        every = -(-n_ranks // MOST_LABELS)
        ticks += [(start + rank, str(rank)) for rank in range(0, n_ranks, every)]
        start += n_ranks + 1
    ax.set(xlim=(-0.8, start - 1.2), ylim=(0, 1.12 * most))
    ax.set_xticks([at for at, _ in ticks], [text for _, text in ticks])
    ax.tick_params(axis="x", length=0)


def layouts_table(searches: Mapping[str, Found]) -> pd.DataFrame:
    """Table for the figure of layouts: the best layout for every value of every degree of parallelism.

    Returns:
        Columns model, degree, value, tokens_per_s_gpu (0 if nothing fits or nothing is legal) and wall.
    """
    rows = [
        (name, wall.degree, wall.value, wall.relative * found.tokens_per_s_gpu, wall.wall)
        for name, found in searches.items()
        for wall in found.walls
    ]
    return pd.DataFrame(rows, columns=["model", "degree", "value", "tokens_per_s_gpu", "wall"])


def draw_layouts(table: pd.DataFrame, ax: Axes, *, font_pt: float = 8.0) -> None:
    """Draws the throughput of the best layout with each value of each degree; a cross if there is none.

    Args:
        table: from `layouts_table`.
        font_pt: size of the text in points.
    """
    x_label = "Ranks of each kind, pipeline stages of a rank (VPP), sequences of a micro-batch (MBS)"
    dress(ax, x_label, "Best layout (tokens/s a GPU)", font_pt)
    if table.empty:
        draw_message(ax, "nothing to show", font_pt)
        return
    at: dict[tuple[str, int], float] = {}
    position, middles = 0.0, {}
    for degree, rows in table.groupby("degree", sort=False):
        values = sorted(set(rows["value"]))
        for value in values:
            at[str(degree), value] = position
            position += 1
        middles[str(degree)] = position - (len(values) + 1) / 2
        position += 1
    styles, handles = line_styles(table["model"]), []
    for i, (name, style) in enumerate(styles.items()):
        look, shift = style.look(font_pt), 0.3 * (i - (len(styles) - 1) / 2)
        for degree in middles:
            rows = table[(table["model"] == name) & (table["degree"] == degree)].sort_values("value")
            fits = rows[rows["tokens_per_s_gpu"] > 0]
            x = [at[degree, value] + shift for value in fits["value"]]
            ax.plot(x, fits["tokens_per_s_gpu"], zorder=3, label=f"_{name}", **look)
            none = rows[rows["tokens_per_s_gpu"] == 0]
            if not none.empty:  # an empty line that is not clipped would lie at the corner of the figure
                ax.plot([at[degree, value] + shift for value in none["value"]], [0.0] * len(none), ls="", marker="x",
                        ms=0.5 * font_pt, mec=style.color, zorder=3, clip_on=False, label=f"_{name}")  # fmt: skip
        handles.append(Line2D([], [], label=name, **look))
    handles.append(Line2D([], [], ls="", marker="x", ms=0.5 * font_pt, mec=LINE, label="does not fit, or is not legal"))
    most = max(float(table["tokens_per_s_gpu"].max()), 1e-9)
    ax.set(xlim=(-0.8, position - 1.2), ylim=(-0.05 * most, 1.1 * most))  # crosses at 0 stay clear of the labels
    ax.set_xticks(list(at.values()), [str(value) for _, value in at])
    ax.tick_params(axis="x", labelsize=font_pt - 1.5, labelrotation=90, length=0, pad=1)
    for degree, middle in middles.items():
        label = ax.annotate("MBS" if degree == "micro_batch" else degree.upper(), (middle, 0), (0, -2 * font_pt),
                            xycoords=("data", "axes fraction"), textcoords="offset points", ha="center", va="top",
                            fontsize=font_pt - 0.5, color=INK)  # fmt: skip
        label.set_in_layout(False)  # the label of the axis below it makes room
    ax.xaxis.labelpad = 2.0 * font_pt
    ax.grid(visible=False, axis="x")
    legend(ax, handles, font_pt)


def plot_plans(
    plans: Mapping[str, Plan],
    searches: Mapping[str, Found] | None = None,
    *,
    width: float = README_WIDTH,
    height: float | None = None,
    title: str | None = None,
) -> RunFigure:
    """Plots the memory of every rank with the capacity, and below it the throughput of the searched layouts.

    Args:
        plans: plans by name of the model.
        searches: the searches that found them; if empty, there is no lower panel.
        width: inches; text is 7 points up to a paper's column and 8.5 points on a page.
        height: inches; None follows the number of panels.
        title: drawn above the axes if given.
    """
    font_pt, n = text_pt(width), 2 if searches else 1
    clusters = ", ".join(dict.fromkeys(plan.cluster.name for plan in plans.values()))
    figure = RunFigure(width, height or 2.8 * n, title or f"Training on {clusters}", plans, "models")
    if title:
        figure.suptitle(title, fontsize=font_pt + 1)
    axes = figure.subplots(n, 1, squeeze=False)[:, 0]
    draw_plan_memory(plan_memory_table(plans), axes[0], font_pt=font_pt)
    if searches:
        draw_layouts(layouts_table(searches), axes[1], font_pt=font_pt)
    handles: list[Artist] = [Patch(color=color, label=kind) for kind, color in MEMORY.items()]
    handles.append(Line2D([], [], color=INK, lw=0.9, ls=(0, (4, 2)), label="capacity"))
    if plans:
        axes[0].legend(handles=handles, ncols=5, loc="lower left", bbox_to_anchor=(0, 1.02 + 0.08 * (len(plans) > 1)),
                       fontsize=font_pt - 0.5, frameon=False, borderaxespad=0, borderpad=0.2, handlelength=1.3,
                       labelcolor=INK)  # fmt: skip
    return figure
