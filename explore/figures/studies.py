"""Figures of studies: differences from a baseline with intervals, loss against compute, and searches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from explore.figures.axes import LINE, draw_message, dress, legend, log_axis, rows_of_names
from explore.figures.base import COLUMN_WIDTH, RunFigure
from explore.figures.panels import line_styles
from explore.quantities import quantity

VERDICTS: Mapping[str, tuple[str, str, str]] = {
    "better": ("#0173b2", "o", "better"),
    "worse": ("#d55e00", "s", "worse"),
    "equivalent": ("#029e73", "^", "equivalent"),
    "not resolved": ("0.45", "D", "not resolved"),
    "exploratory": ("0.45", "o", "not a primary comparison"),
}
"""Colour, marker and legend of each verdict of `explore.frontier.compare`; exploratory ones are hollow."""
UNCORRECTED = "verdicts are corrected, intervals are not"
"""Words on why a verdict may be `not resolved` although its interval leaves out zero."""


def stacked(heights: Sequence[float], title: str, width: float = COLUMN_WIDTH) -> tuple[RunFigure, list[Axes]]:
    """Makes a figure one column of a paper wide, with stacked axes of these heights in inches.

    Args:
        title: title in the metadata of its files.
    """
    figure = RunFigure(width, sum(heights), title, ())
    axes = figure.subplots(len(heights), 1, height_ratios=list(heights), squeeze=False)
    return figure, list(axes[:, 0])


def mark(figure: RunFigure, words: str, font_pt: float = 7.0) -> None:
    """Writes a warning above a study's figure."""
    figure.suptitle(words, fontsize=font_pt, color=VERDICTS["worse"][0], x=0.99, ha="right")


def draw_comparisons(
    ax: Axes,
    table: pd.DataFrame,
    names: Mapping[str, str],
    label: str,
    *,
    arm: str = "arm",
    seeds: pd.DataFrame | None = None,
    font_pt: float = 7.0,
) -> None:
    """Draws differences from a baseline: a row per arm, with interval, coloured by verdict; zero is the baseline.

    Intervals are of one comparison each, while verdicts are corrected for the number of comparisons. The label of the
    axis says so if a verdict is shown.

    Args:
        table: from `explore.frontier.compare`.
        names: the arms to draw, from the top, and their labels.
        label: label of the axis, with its unit.
        seeds: differences of single seeds, with the columns `arm` and difference, drawn as dots below the intervals.
    """
    dress(ax, label, "", font_pt)
    rows = table.set_index(arm)
    shown = [each for each in names if each in rows.index]
    if not shown:
        draw_message(ax, "no arms beside the baseline", font_pt)
        return
    ax.axvline(0, color=LINE, lw=0.8, zorder=1)
    for place, each in enumerate(shown):
        row = rows.loc[each]
        color, marker, _ = VERDICTS[str(row["verdict"])]
        ax.plot([row["low"], row["high"]], [place, place], color=color, lw=0.16 * font_pt, zorder=2)
        face = "white" if row["verdict"] == "exploratory" else color
        ax.plot(row["difference"], place, marker=marker, ms=0.6 * font_pt, mfc=face, mec=color, zorder=3)
        if seeds is not None:
            dots = seeds.loc[seeds[arm] == each, "difference"].dropna()
            ax.plot(dots, np.full(len(dots), place + 0.27), color=color, **_dots(font_pt))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    rows_of_names(ax, [names[each] for each in shown])
    present = [verdict for verdict in VERDICTS if verdict in set(rows.loc[shown, "verdict"])]
    if present != ["exploratory"]:
        ax.set_xlabel(f"{label}\n({UNCORRECTED})")
    handles = [_verdict_handle(verdict, font_pt) for verdict in present]
    if seeds is not None:
        handles.append(Line2D([], [], color=LINE, label="a seed", **_dots(font_pt)))
    legend(ax, handles, font_pt)


def _verdict_handle(verdict: str, font_pt: float) -> Line2D:
    color, marker, words = VERDICTS[verdict]
    face = "white" if verdict == "exploratory" else color
    return Line2D([], [], color=color, lw=0.16 * font_pt, marker=marker, ms=0.6 * font_pt, mfc=face, label=words)


def _dots(font_pt: float) -> dict[str, Any]:
    """Style of dots for single seeds."""
    return {"ls": "", "marker": "o", "ms": 0.3 * font_pt, "mew": 0, "alpha": 0.6}


def draw_laws(
    ax: Axes,
    bands: pd.DataFrame,
    curves: pd.DataFrame,
    names: Mapping[str, str],
    *,
    arm: str = "arm",
    cost: str = "flops_run",
    error: str = "test_bpb",
    seeds: pd.DataFrame | None = None,
    font_pt: float = 7.0,
) -> None:
    """Draws mean loss against compute with intervals, and the fitted law of each family with its band.

    Args:
        bands: from `explore.frontier.seed_bands`.
        curves: columns `arm`, compute, loss, low and high, of laws fitted to the same runs.
        names: the arms to draw, and their labels.
        seeds: scores of single runs, with the columns `arm`, `cost` and `error`, drawn as dots on the right.
    """
    dress(ax, quantity(cost).axis_label, quantity(error).axis_label, font_pt)
    styles = line_styles(names)
    log_axis(ax, bands[cost], 0.08)
    for each, name in names.items():
        rows = bands[bands[arm] == each].sort_values(cost)
        style = styles[each]
        curve = curves[curves[arm] == each]
        ax.fill_between(curve["compute"], curve["low"], curve["high"], color=style.color, alpha=0.15, lw=0)
        ax.plot(curve["compute"], curve["loss"], color=style.color, ls=style.dashes, lw=0.14 * font_pt)
        ax.vlines(rows[cost], rows["low"], rows["high"], color=style.color, lw=0.14 * font_pt)
        ax.plot(rows[cost], rows[error], **style.look(font_pt, line=False), label=name)
        if seeds is not None:
            dots = seeds[seeds[arm] == each]
            ax.plot(1.05 * dots[cost], dots[error], color=style.color, **_dots(font_pt))
    handles = [Line2D([], [], **styles[each].look(font_pt), label=name) for each, name in names.items()]
    legend(ax, handles, font_pt)


def draw_gaps(
    ax: Axes,
    gaps: pd.DataFrame,
    x: str,
    sizes: Sequence[int],
    *,
    size: str = "d_model",
    arm: str | None = None,
    names: Mapping[str, str] | None = None,
    label: str = "Difference",
    font_pt: float = 7.0,
) -> None:
    """Draws differences between two arms along their runs, one line per size; zero is the baseline.

    Comparing these lines over steps and over FLOPs separates an effect of the number of steps from one of size.

    Args:
        gaps: columns `size`, `x` and difference, as `explore.frontier.paired_curves` gives them; its range over the
            pairs is drawn as a band.
        arm: column of the arms, if `gaps` has several; each then has its own lines.
        names: the arms to draw, and their labels.
        label: label of the vertical axis, with its unit.
    """
    dress(ax, quantity(x).axis_label, label, font_pt)
    if gaps.empty:
        draw_message(ax, "no learning curves", font_pt)
        return
    ax.axhline(0, color=LINE, lw=0.8, zorder=1)
    lines = [(each, own) for own in names or {"": ""} for each in sizes]
    styles = line_styles(map(str, lines))
    for each, own in lines:
        rows = gaps[(gaps[size] == each) & (True if arm is None else gaps[arm] == own)].sort_values(x)
        if rows.empty:
            continue
        look = {**styles[str((each, own))].look(font_pt), "marker": ""}
        word = f"{quantity(size).name} {each}"
        ax.plot(rows[x], rows["difference"], **look, label=word if names is None else f"{names[own]}, d {each}")
        if {"low", "high"} <= set(rows.columns):
            band = rows[[x, "low", "high"]].astype("float64")
            ax.fill_between(band[x], band["low"], band["high"], color=look["color"], alpha=0.15, lw=0)
    if quantity(x).log and (gaps[x] > 0).any() and x != "step":
        log_axis(ax, gaps[x], 0.08)
    legend(ax, list(ax.get_lines()[1:]), font_pt)


def draw_residuals(
    ax: Axes,
    runs: pd.DataFrame,
    names: Mapping[str, str],
    *,
    arm: str = "arm",
    cost: str = "flops_run",
    error: str = "test_bpb",
    font_pt: float = 7.0,
) -> None:
    """Draws every seed as a dot: its residual from one law common to all arms; no line joins two sizes.

    Args:
        runs: one row per run; the column `fitted` has the loss of the common law at the run's cost.
        names: the arms to draw, and their labels.
    """
    dress(ax, quantity(cost).axis_label, f"{quantity(error).label},\nresidual from the common law", font_pt)
    ax.axhline(0, color=LINE, lw=0.8, zorder=1)
    styles = line_styles(names)
    log_axis(ax, runs[cost], 0.08)
    for i, each in enumerate(names):
        rows = runs[runs[arm] == each]
        aside = 1 + 0.06 * (i - (len(names) - 1) / 2)  # so that arms with the same cost do not hide each other
        off = rows[error] - rows["fitted"]
        look = styles[each].look(font_pt, line=False)
        ax.plot(rows[cost] * aside, off, **{**look, "ms": 0.4 * font_pt, "alpha": 0.6})
        means = off.groupby(rows["d_model"]).mean()
        at = rows.groupby("d_model")[cost].mean() * aside
        ax.plot(at, means, ls="", marker="_", ms=1.6 * font_pt, mew=0.2 * font_pt, color=styles[each].color)
    handles = [Line2D([], [], **styles[each].look(font_pt, line=False), label=name) for each, name in names.items()]
    legend(ax, handles, font_pt)


def draw_floor(
    ax: Axes,
    floors: pd.DataFrame,
    cost: str = "flops_run",
    font_pt: float = 7.0,
    *,
    across: bool = False,
    label: str = "trigram",
) -> None:
    """Draws the score of an n-gram model of the same tokens at each cost: a model above it has learned too little.

    Args:
        floors: columns `cost` and ngram_test_bpb, as `explore.frontier.arms_table` gives them. Costs without a floor
            are left out; without any floor, nothing is drawn.
        label: words beside the score.
        across: draw the mean score as a line across axes with the scores of arms on the x axis, as of `draw_seeds`.
    """
    if "ngram_test_bpb" not in floors or floors["ngram_test_bpb"].isna().all():
        return
    if across:
        floor = float(floors["ngram_test_bpb"].mean())
        ax.axvline(floor, color="0.2", ls=":", lw=0.14 * font_pt, zorder=1, label=label)
        place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        turned: dict[str, Any] = {"fontsize": font_pt - 0.5, "color": "0.2", "rotation": 90, "ha": "right"}
        ax.annotate(label, (floor, 0), xytext=(-1, 2), va="bottom", **place, **turned)
        return
    rows = floors.groupby(cost)["ngram_test_bpb"].mean().dropna()
    ax.plot(rows.index, rows, ls="", marker="_", ms=2 * font_pt, mew=0.2 * font_pt, color="0.2", label=label)
    middle = (rows.index[len(rows) // 2], rows.iloc[len(rows) // 2])
    look: dict[str, Any] = {"fontsize": font_pt - 0.5, "color": "0.2", "ha": "center"}
    low, high = ax.dataLim.intervaly
    ax.update_datalim([(middle[0], min(low, middle[1] - 0.12 * (high - low)))], updatex=False)  # for the label
    ax.autoscale_view(scalex=False)
    ax.annotate(label, middle, xytext=(0, -font_pt), textcoords="offset points", **look)


def draw_levels(
    ax: Axes,
    levels: pd.DataFrame,
    names: Mapping[Any, str],
    x_label: str,
    y_label: str,
    *,
    series: str = "series",
    joined: bool = False,
    seeds: pd.DataFrame | None = None,
    font_pt: float = 7.0,
) -> None:
    """Draws estimates with their intervals against a number, for each series in `names`.

    Args:
        levels: columns `series`, x, estimate, low and high.
        seeds: scores of single runs, with the columns `series`, x and estimate, drawn as dots on the right.
        joined: whether a line joins each series; not for sizes, since nothing was measured between them.
    """
    dress(ax, x_label, y_label, font_pt)
    styles = line_styles(names)
    for i, (each, _) in enumerate(names.items()):
        rows = levels[levels[series] == each].sort_values("x")
        beside = 0.012 * (i - (len(names) - 1) / 2) * float(np.ptp(levels["x"]) or 1)  # so that none hides another
        ax.vlines(rows["x"] + beside, rows["low"], rows["high"], color=styles[each].color, lw=0.14 * font_pt)
        ax.plot(rows["x"] + beside, rows["estimate"], **styles[each].look(font_pt, line=joined))
        if seeds is not None:
            dots = seeds[seeds[series] == each]
            aside = beside + 0.012 * (len(names) + 1.5) * float(np.ptp(levels["x"]) or 1)
            ax.plot(dots["x"] + aside, dots["estimate"], color=styles[each].color, **_dots(font_pt))
    handles = [Line2D([], [], **styles[each].look(font_pt, line=joined), label=name) for each, name in names.items()]
    legend(ax, handles, font_pt)


def draw_scatter(
    ax: Axes,
    points: pd.DataFrame,
    names: Mapping[str, str],
    x_label: str,
    y_label: str,
    *,
    arm: str = "arm",
    floor: float | None = None,
    font_pt: float = 7.0,
) -> None:
    """Draws each arm of a study at its two scores, with the intervals of both.

    Args:
        points: columns `arm`, x, x_low, x_high, y, y_low and y_high.
        names: the arms to draw, and their labels.
        floor: score of an n-gram model on the x axis, drawn as a line; None or NaN draws none.
    """
    dress(ax, x_label, y_label, font_pt)
    styles, handles = line_styles(names), []
    for each, name in names.items():
        rows, look = points[points[arm] == each], styles[each].look(font_pt, line=False)
        ax.hlines(rows["y"], rows["x_low"], rows["x_high"], color=styles[each].color, lw=0.14 * font_pt)
        ax.vlines(rows["x"], rows["y_low"], rows["y_high"], color=styles[each].color, lw=0.14 * font_pt)
        ax.plot(rows["x"], rows["y"], **look)
        handles.append(Line2D([], [], **look, label=name))
    if floor is not None and np.isfinite(floor):
        handles.append(ax.axvline(floor, color="0.2", ls=":", lw=0.14 * font_pt, zorder=1, label="trigram"))
    legend(ax, handles, font_pt)


def draw_search(
    ax: Axes,
    trials: pd.DataFrame,
    names: Mapping[str, str],
    label: str,
    *,
    kind: str = "kind",
    value: str = "val_bpb",
    font_pt: float = 7.0,
) -> None:
    """Draws the score of every trial of a search, a marker per kind in `names`, and the best so far as a line.

    Args:
        trials: one row per trial, in order.
        label: label of the axis of trials.
    """
    dress(ax, label, quantity(value).axis_label, font_pt)
    if trials.empty:
        draw_message(ax, "no finished runs", font_pt)
        return
    place = np.arange(1, len(trials) + 1)
    styles = line_styles(names)
    sign = quantity(value).sign
    ax.step(place, sign * (sign * trials[value]).cummin(), where="post", color=LINE, lw=0.12 * font_pt, zorder=1)
    handles = [Line2D([], [], color=LINE, lw=0.12 * font_pt, label="best so far")]
    for each, name in names.items():
        shown = (trials[kind] == each).to_numpy()
        look = styles[each].look(font_pt, line=False)
        ax.plot(place[shown], trials.loc[shown, value], **look, zorder=2)
        handles.insert(-1, Line2D([], [], **look, label=name))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(ax, handles, font_pt)
