"""Every seed of every arm as a dot, since a mean hides that some runs succeed and others fail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from explore.figures.axes import LINE, draw_message, dress, legend, log_axis, rows_of_names

SPREAD = 0.34
"""Largest distance of dots from the middle of a row."""


def draw_seeds(
    ax: Axes,
    runs: pd.DataFrame,
    names: Mapping[str, str],
    columns: Mapping[str, str],
    label: str,
    *,
    arm: str = "arm",
    missing: tuple[float, str] | None = None,
    log: bool = False,
    font_pt: float = 7.0,
) -> None:
    """Draws a row per arm and a dot per run, for each column, with a line at the median.

    Args:
        runs: one row per run.
        names: the arms to draw, from the top, and their labels.
        columns: columns of `runs`, and their labels; later columns are darker.
        missing: where to draw runs without a value, as hollow dots, and their label; None leaves them out.
        log: whether the axis is logarithmic.
    """
    dress(ax, label, "", font_pt)
    shown = [each for each in names if each in set(runs[arm])]
    if not shown:
        draw_message(ax, "no finished runs", font_pt)
        return
    shades = sns.color_palette("crest", len(columns)) if len(columns) > 1 else [sns.color_palette("colorblind")[0]]
    height = 2 * SPREAD / len(columns)
    for place, each in enumerate(shown):
        for i, column in enumerate(columns):
            values = runs.loc[runs[arm] == each, column].astype(float).sort_values(na_position="last").to_numpy()
            middle = place - SPREAD + height * (i + 0.5)
            beside = np.linspace(-0.25, 0.25, len(values)) * height if len(values) > 1 else np.zeros(1)
            known = np.isfinite(values)
            look: dict[str, Any] = {"ls": "", "marker": "o", "ms": 0.42 * font_pt, "mec": shades[i]}
            ax.plot(values[known], middle + beside[known], mfc=shades[i], mew=0.06 * font_pt, zorder=3, **look)
            if missing is not None and not known.all():  # an empty unclipped line would reach the corner of the figure
                at = np.full(int((~known).sum()), missing[0])
                ax.plot(at, middle + beside[~known], mfc="white", mew=0.1 * font_pt, zorder=3, clip_on=False, **look)
            if known.sum() * 2 > len(values):  # more than half of all runs have a value, so their median has one
                median = float(np.median(np.where(known, values, np.inf)))
                ax.plot(
                    [median] * 2, [middle - height / 2, middle + height / 2], color=LINE, lw=0.12 * font_pt, zorder=2
                )
    if log:
        drawn = runs.loc[runs[arm].isin(shown), list(columns)].to_numpy(dtype=float).ravel()
        ends = drawn[np.isfinite(drawn)] if missing is None else np.append(drawn[np.isfinite(drawn)], missing[0])
        log_axis(ax, pd.Series(ends), 0.05)
    rows_of_names(ax, [names[each] for each in shown])
    legend(ax, _handles(columns, shades, missing, font_pt), font_pt)


def _handles(
    columns: Mapping[str, str],
    shades: list[tuple[float, float, float]],
    missing: tuple[float, str] | None,
    font_pt: float,
) -> list[Line2D]:
    dots: dict[str, Any] = {"ls": "", "marker": "o", "ms": 0.42 * font_pt}
    handles = [
        Line2D([], [], color=shade, label=name, **dots) for name, shade in zip(columns.values(), shades, strict=True)
    ]
    if missing is not None:
        handles.append(Line2D([], [], mfc="white", mec=shades[-1], mew=0.1 * font_pt, label=missing[1], **dots))
    return [*handles, Line2D([], [], color=LINE, lw=0.12 * font_pt, label="median")]
