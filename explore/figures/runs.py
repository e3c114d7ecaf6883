"""Shared by the figures of runs: the choice of rows, and the axes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from explore.figures.axes import draw_message, dress, is_log, log_axis, power_of_ten, span
from explore.figures.base import RunFigure, text_pt
from explore.foreign import check_type, echo
from explore.frontier.columns import check_columns
from explore.quantities import EVAL_DATA, quantity

NARROW = 1.5
"""Costs whose ratio is below this are drawn on a linear axis, which they fill."""

_UNTOLD = {"run": "", "family": "other", "pattern": ""}


def check_table(table: pd.DataFrame, x: str, y: str) -> None:
    """Raises an error that names every missing column.

    Raises:
        ValueError: a column is missing, or x and y are the same.
    """
    check_type(table, pd.DataFrame, "runs must be a table, as explore.load_runs gives it")
    if x == y:
        raise ValueError(f"y: must be another column than x, got {y!r}")
    check_columns(table, (x, y), "runs")


def named(table: pd.DataFrame) -> pd.DataFrame:
    """The rows not marked as unfinished; a row without `run` is named by its index."""
    if "status" in table:
        table = table[table["status"].eq("finished").fillna(False).astype(bool)]
    return table if "run" in table else table.assign(run=table.index)


def finished(table: pd.DataFrame, x: str, y: str, also: Iterable[str] = ()) -> pd.DataFrame:
    """Columns run, family, pattern, x and y of the finished rows in which x and y are finite.

    Args:
        table: any table with the columns x and y; a row without `run` is named by its index.
        also: further columns to keep if the table has them.

    Raises:
        ValueError: a column is missing, x and y are the same, or runs on different data would be compared.
    """
    check_table(table, x, y)
    table = named(table)
    texts = {
        column: table[column].astype("str").fillna(other) if column in table else other
        for column, other in _UNTOLD.items()
    }
    numbers = {column: pd.to_numeric(table[column], errors="coerce").astype("float64") for column in (x, y)}
    kept = {column: table[column] for column in also if column in table and column not in (*texts, x, y)}
    known = pd.DataFrame({**texts, **numbers, **kept}, index=table.index)
    known = known.replace([np.inf, -np.inf], np.nan).dropna(subset=[x, y])
    if EVAL_DATA in table:
        _check_comparable(table[table.index.isin(known.index)], x, y)
    return known.reset_index(drop=True)


def _check_comparable(table: pd.DataFrame, *columns: str) -> None:
    """Raises an error if a column depends on the data and runs were evaluated on different data."""
    own = [column for column in columns if quantity(column).is_on_own_data]
    data = table[EVAL_DATA].astype("str").fillna("unknown")
    if not own or data.nunique() < 2:
        return
    names = table["corpus"].astype("str").fillna("no text") if "corpus" in table else data
    counted = sorted(Counter(zip(names, data, strict=True)).items())
    groups = [f"{n} on {echo(name)}" for (name, _), n in counted]
    raise ValueError(
        f"{own[0]} cannot be compared between runs on different data; there are {', '.join(groups[:4])}; "
        "choose one (explore plot --corpus), or a score on one text for all, such as sotu_bpb"
    )


def one_axes(
    table: pd.DataFrame, x: str, y: str, width: float, height: float, title: str | None
) -> tuple[RunFigure, Axes, float]:
    """Makes a figure of a table of runs with one pair of axes; returns also the font size in points."""
    words = f"{quantity(y).axis_label} against {quantity(x).axis_label}"
    figure = RunFigure(width, height, title or words, table["run"])
    font_pt = text_pt(width)
    if title:
        figure.suptitle(title, fontsize=font_pt + 1)
    return figure, figure.add_subplot(), font_pt


def is_log_x(table: pd.DataFrame, x: str) -> bool:
    """Whether the horizontal axis is logarithmic."""
    wide = table.empty or table[x].max() >= NARROW * table[x].min() or table[x].nunique() == 1
    return quantity(x).log is not False and is_log(table[x]) and bool(wide)


def dress_runs(
    ax: Axes,
    table: pd.DataFrame,
    x: str,
    y: str,
    font_pt: float,
    margins_x: tuple[float, float] = (0.05, 0.05),
    margins_y: tuple[float, float] = (0.06, 0.06),
) -> bool:
    """Sets scales, labels and grid of the axes; returns whether there is anything to draw.

    Args:
        margins_x: margins left and right of the points, as fractions of their span.
        margins_y: margins below and above the points, as fractions of their span.
    """
    dress(ax, quantity(x).axis_label, quantity(y).axis_label, font_pt)
    if table.empty:
        draw_message(ax, "no finished runs", font_pt)
        return False
    _scale(ax, "x", table[x], margins_x, log=quantity(x).log is not False and is_log(table[x]))
    _scale(ax, "y", table[y], margins_y, log=bool(quantity(y).log) and is_log(table[y]))
    return True


def _scale(
    ax: Axes, which: Literal["x", "y"], values: pd.Series[float], margins: tuple[float, float], *, log: bool
) -> None:
    if log and (values.max() >= NARROW * values.min() or values.max() == values.min()):
        log_axis(ax, values, *margins, which=which)
    else:
        low, high = span(values)
        if log:  # less than a decade: only a linear axis has round numbers to label
            axis = ax.xaxis if which == "x" else ax.yaxis
            axis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
            axis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
        ax.set(**{f"{which}lim": (low - margins[0] * (high - low), high + margins[1] * (high - low))})
