"""Figures of decoding: state per sequence, time per step, and throughput."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from explore.cost import DTYPES, Cost, Dtypes
from explore.figures.axes import (
    LINE,
    draw_message,
    dress,
    legend,
    log_limits,
    ticks_of_ten,
    ticks_of_two,
)
from explore.figures.base import README_HEIGHT, README_WIDTH, Color, RunFigure, text_pt
from explore.figures.panels import line_styles
from explore.formatting import milliseconds, plain, size, tokens
from explore.frontier.columns import check_columns

if TYPE_CHECKING:
    from explore.model import ModelConfig

CONTEXTS = tuple(2**i for i in range(6, 21))
"""Default context lengths in tokens at which state is counted."""


def state_table(
    models: Mapping[str, ModelConfig], contexts: Sequence[int] = CONTEXTS, dtypes: Dtypes = DTYPES
) -> pd.DataFrame:
    """Table for the figure of decoding state: bytes kept per sequence after each context.

    Returns:
        Columns model, context (tokens), kv_bytes, ssm_state_bytes, conv_state_bytes, and state_bytes: their sum.
    """
    parts = ["kv_bytes", "ssm_state_bytes", "conv_state_bytes"]
    rows = [
        (name, context, *(getattr(Cost.of(model.ledger(context), dtypes), part) for part in parts))
        for name, model in models.items()
        for context in contexts
    ]
    table = pd.DataFrame(rows, columns=["model", "context", *parts])
    table = table.astype({"context": "int64"} | dict.fromkeys(parts, "float64"))
    return table.assign(state_bytes=table[parts].sum(axis=1))


def draw_state(table: pd.DataFrame, ax: Axes, *, font_pt: float = 8.0) -> None:
    """Draws decoding state against context, both on log axes: one line per model.

    Args:
        table: from `state_table`; a model without state is not drawn.
        font_pt: size of the text in points; lines and markers follow it.
    """
    dress(ax, "Context (tokens)", "Decoding state of a sequence", font_pt)
    table = _positive(table.assign(series=table["model"]), "context", "state_bytes")
    if not _lines(ax, table, "context", "state_bytes", font_pt):
        return
    ticks_of_two(ax.xaxis, tokens)
    ticks_of_two(ax.yaxis, size)


def plot_state(
    models: Mapping[str, ModelConfig],
    contexts: Sequence[int] = CONTEXTS,
    dtypes: Dtypes = DTYPES,
    *,
    width: float = README_WIDTH,
    height: float = README_HEIGHT,
    title: str | None = None,
) -> RunFigure:
    """Plots the state of keys, values, recurrences and convolutions per sequence against context.

    Args:
        width: inches; text is 7 points up to a paper's column and 8.5 points on a page.
        height: inches.
        title: drawn above the axes if given.
    """
    table = state_table(models, contexts, dtypes)
    figure, ax, font_pt = _figure("Decoding state against context", models, width, height, title)
    draw_state(table, ax, font_pt=font_pt)
    return figure


def latency_table(table: pd.DataFrame) -> pd.DataFrame:
    """Table for figures of decoding speed: the rows whose numbers are positive and finite, by rising batch.

    Args:
        table: columns model, batch_size (sequences), context (tokens), step_s (seconds) and tokens_per_s (per device);
            optionally fits, whether the batch fits into memory; other columns are dropped.

    Returns:
        Those columns, and series: the model, with its context if the table has several. Series keep their order;
        without a value in fits, a batch counts as fitting.

    Raises:
        ValueError: a column is missing.
    """
    numbers = ["batch_size", "context", "step_s", "tokens_per_s"]
    check_columns(table, ["model", *numbers])
    values = {column: pd.to_numeric(table[column], errors="coerce").astype("float64") for column in numbers}
    fits = table["fits"].ne(False).astype(bool) if "fits" in table else True
    known = _positive(pd.DataFrame({"model": table["model"].astype("str"), **values, "fits": fits}), *numbers)
    several = known["context"].nunique() > 1
    names = [f"{m}, {tokens(c)}" if several else m for m, c in zip(known["model"], known["context"], strict=True)]
    known["series"] = pd.Series(names, index=known.index, dtype="str")
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    known = known.assign(order=known["series"].map(order)).sort_values(["order", "batch_size"], kind="stable")
    return known.drop(columns="order").reset_index(drop=True)


def draw_latency(table: pd.DataFrame, ax: Axes, *, font_pt: float = 8.0) -> None:
    """Draws the time of a decoding step against the batch, both on log axes: one line per model.

    Markers are hollow if the batch does not fit.

    Args:
        table: from `latency_table`.
        font_pt: size of the text in points; lines and markers follow it.
    """
    dress(ax, "Batch (sequences)", "Decoding step (ms)", font_pt)
    table = _positive(table, "batch_size", "step_s")
    if not _lines(ax, table, "batch_size", "step_s", font_pt):
        return
    ticks_of_two(ax.xaxis, plain)
    ticks_of_ten(ax.yaxis, milliseconds)


def draw_throughput(table: pd.DataFrame, ax: Axes, *, font_pt: float = 8.0) -> None:
    """Draws throughput against the time of a step, both on log axes: one line per model.

    Markers are hollow if the batch does not fit. A step yields one token per sequence, so points with the same batch
    and number of devices lie on a diagonal, labelled with the batch.

    Args:
        table: from `latency_table`.
        font_pt: size of the text in points; lines and markers follow it.
    """
    dress(ax, "Decoding step (ms)", "Throughput (tokens/s per device)", font_pt)
    table = _positive(table, "batch_size", "step_s", "tokens_per_s")
    if not _lines(ax, table, "step_s", "tokens_per_s", font_pt):
        return
    _diagonals(ax, table, font_pt)
    ticks_of_ten(ax.xaxis, milliseconds)
    ticks_of_ten(ax.yaxis, plain)


def plot_latency(
    table: pd.DataFrame, *, width: float = README_WIDTH, height: float = README_HEIGHT, title: str | None = None
) -> RunFigure:
    """Plots the time of a decoding step against the batch, from a table as for `latency_table`; see `plot_state`."""
    known = latency_table(table)
    figure, ax, font_pt = _figure("Decoding step against batch", known["model"], width, height, title)
    draw_latency(known, ax, font_pt=font_pt)
    return figure


def plot_throughput(
    table: pd.DataFrame, *, width: float = README_WIDTH, height: float = README_HEIGHT, title: str | None = None
) -> RunFigure:
    """Plots throughput against the time of a decoding step, from a table as for `latency_table`; see `plot_state`."""
    known = latency_table(table)
    figure, ax, font_pt = _figure("Throughput against decoding step", known["model"], width, height, title)
    draw_throughput(known, ax, font_pt=font_pt)
    return figure


def _positive(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The rows that are positive and finite in each of the columns."""
    for column in columns:
        table = table[np.isfinite(table[column]) & (table[column] > 0)]
    return table.reset_index(drop=True)


def _lines(ax: Axes, table: pd.DataFrame, x: str, y: str, font_pt: float) -> bool:
    """Draws one line per series on log axes, with a legend; returns whether there was anything to draw."""
    if table.empty:
        draw_message(ax, "nothing to show", font_pt)
        return False
    ax.set(xscale="log", yscale="log", xlim=log_limits(table[x]), ylim=log_limits(table[y]))
    handles = []
    for series, style in line_styles(table["series"]).items():
        rows = table[table["series"] == series]
        look, fits = style.look(font_pt), rows.get("fits", pd.Series(True, rows.index)).to_numpy(dtype=bool)
        ax.plot(rows[x], rows[y], label=series, zorder=3, markevery=np.flatnonzero(fits).tolist(), **look)
        if not fits.all():
            ax.plot(rows[x][~fits], rows[y][~fits], label=f"_{series}", zorder=3, **_hollow(look, style.color))
        handles.append(Line2D([], [], label=series, **look))
    if "fits" in table and not table["fits"].all():
        look = line_styles([""])[""].look(font_pt)
        handles.append(Line2D([], [], label="does not fit", **_hollow(look, LINE)))
    legend(ax, handles, font_pt)
    return True


def _hollow(look: Mapping[str, Any], color: Color | str) -> dict[str, Any]:
    """The same markers, hollow and without a line."""
    return {**look, "ls": "", "mfc": "white", "mec": color, "mew": look["lw"]}


def _diagonals(ax: Axes, table: pd.DataFrame, font_pt: float) -> None:
    """Draws a diagonal for each batch with a single value of tokens_per_s * step_s, labelled at its lower end."""
    tokens_per_step = (table["tokens_per_s"] * table["step_s"]).groupby(table["batch_size"]).agg(["min", "max"])
    one = tokens_per_step["max"] < (1 + 1e-6) * tokens_per_step["min"]
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    bottom /= (top / bottom) ** 0.1  # room for the numbers
    ax.set_ylim(bottom, top)
    look: Mapping[str, Any] = {"fontsize": font_pt - 1, "color": LINE, "textcoords": "offset points"}
    for i, (batch, n) in enumerate(tokens_per_step["min"][one].items()):
        text = f"batch {batch:g}" if i == 0 else f"{batch:g}"
        ax.plot([left, right], [n / left, n / right], color=LINE, lw=0.5, ls=(0, (1, 2)), zorder=1,
                label="_batch", scalex=False, scaley=False)  # fmt: skip
        if left < n / bottom < right:
            ax.annotate(text, (n / bottom, bottom), (-0.7 * font_pt, 2), ha="right", va="bottom", **look)
        elif bottom < n / right < top:
            ax.annotate(text, (right, n / right), (-2, -2), ha="right", va="top", **look)


def _figure(
    otherwise: str, models: Iterable[str], width: float, height: float, title: str | None
) -> tuple[RunFigure, Axes, float]:
    """Makes a figure of models with one pair of axes; returns also the font size in points."""
    figure, font_pt = RunFigure(width, height, title or otherwise, models, "models"), text_pt(width)
    if title:
        figure.suptitle(title, fontsize=font_pt + 1)
    return figure, figure.add_subplot(), font_pt
