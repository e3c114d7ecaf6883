"""Training FLOPs of the same models by counting convention, relative to an exact count of all products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from explore.cost import CONVENTIONS, flops_train
from explore.figures.axes import BAND, INK, LINE, draw_message, dress, rows_of_names, ticks_of_ten
from explore.figures.base import README_WIDTH, RunFigure, text_pt
from explore.figures.panels import LineStyle, line_styles, one_x_label, outside_legend, panels
from explore.formatting import plain, tokens

if TYPE_CHECKING:
    from explore.model import ModelConfig


def conventions_table(models: Mapping[str, ModelConfig], seq_lens: Sequence[int]) -> pd.DataFrame:
    """Table for the figure of conventions: training FLOPs per token as each convention counts them.

    Returns:
        Columns model, seq_len, convention, flops_train (per token), and relative (ratio to `exact`).
    """
    rows = []
    for name, model in models.items():
        for seq_len in seq_lens:
            ledger = model.ledger(seq_len)
            counts = {convention: flops_train(ledger, convention) for convention in CONVENTIONS}
            rows += [(name, seq_len, which, float(n), n / counts["exact"]) for which, n in counts.items()]
    table = pd.DataFrame(rows, columns=["model", "seq_len", "convention", "flops_train", "relative"])
    return table.astype({"seq_len": "int64", "flops_train": "float64", "relative": "float64"})


def draw_conventions(table: pd.DataFrame, ax: Axes, seq_len: int, *, font_pt: float = 8.0) -> None:
    """Draws the counts at one sequence length: a row per model, a marker per convention, a line at `exact`.

    Args:
        table: from `conventions_table`; its other sequence lengths set the limits too, so that panels compare.
        font_pt: size of the text in points; the markers follow it.
    """
    table = table.replace([np.inf, -np.inf], np.nan).dropna()
    table = table[table["relative"] > 0]
    names, here = list(dict.fromkeys(table["model"])), table[table["seq_len"] == seq_len]
    dress(ax, "Training FLOPs, relative to exact", "", font_pt)
    ax.set_title(f"{tokens(seq_len)} tokens", fontsize=font_pt, color=INK)
    if here.empty:
        draw_message(ax, "nothing to show", font_pt)
        return
    ax.axvline(1.0, color=LINE, lw=0.11 * font_pt, zorder=1, label="exact")
    styles = _convention_styles()
    for i, (convention, style) in enumerate(styles.items()):
        rows = here[here["convention"] == convention]
        beside = 0.27 * (i - (len(styles) - 1) / 2)
        places = [names.index(name) + beside for name in rows["model"]]
        ax.plot(rows["relative"], places, label=convention, zorder=3, **style.look(font_pt, line=False))
    ax.set_xscale("log")
    ax.set_xlim(_around(table["relative"]))
    ticks_of_ten(ax.xaxis, plain)
    rows_of_names(ax, names)
    for i in range(0, len(names), 2):
        ax.axhspan(i - 0.5, i + 0.5, color=BAND, lw=0, zorder=0)


def plot_conventions(
    models: Mapping[str, ModelConfig],
    seq_lens: Sequence[int],
    *,
    width: float = README_WIDTH,
    height: float | None = None,
    title: str | None = None,
) -> RunFigure:
    """Plots the counts of conventions relative to `exact`, a panel per sequence length; see `plot_receipts`."""
    table, font_pt = conventions_table(models, seq_lens), text_pt(width)
    label = "Training FLOPs per token by convention, relative to exact"
    figure, axes = panels(len(seq_lens), len(models), width, height, title, label, models)
    for seq_len, ax in zip(seq_lens, axes, strict=True):
        draw_conventions(table, ax, seq_len, font_pt=font_pt)
    one_x_label(axes)
    exact = Line2D([], [], color=LINE, lw=0.11 * font_pt, label="exact")
    styles = _convention_styles().items()
    handles = [Line2D([], [], label=name, **style.look(font_pt, line=False)) for name, style in styles]
    outside_legend(figure, [exact, *handles] if len(table) else [], font_pt)
    return figure


def _convention_styles() -> dict[str, LineStyle]:
    return line_styles(convention for convention in CONVENTIONS if convention != "exact")


def _around(ratios: pd.Series[float]) -> tuple[float, float]:
    """Limits of a log axis around ratios and around 1."""
    low, high = min(float(ratios.min()), 1 / 1.2), max(float(ratios.max()), 1.2)
    room = (high / low) ** 0.06
    return low / room, high * room
