"""Figure of the scores of a trained parent: axes with weak indices, and the effect of removing each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from explore.figures.axes import INK, LINE, draw_message, dress
from explore.figures.base import README_WIDTH, RunFigure, text_pt

if TYPE_CHECKING:
    from explore.compress import Scores
    from explore.model import ModelConfig

EFFECTS = {"kl": "KL divergence (nats)", "loss": "Added loss (nats)", "mse": "MSE before the head"}
"""Measures of the effect of removing a layer, and their labels."""


def scores_table(scores: Scores, model: ModelConfig) -> pd.DataFrame:
    """Table for the heat map: one row per layer, one column per axis.

    Returns:
        The share of the score that the weaker half of the indices holds, from 0 to 0.5; NaN if a layer does not have
        the axis. The index is the layer's index and letter.
    """
    from explore.compress import weak_halves

    names = [f"{i} {letter}" for i, letter in enumerate(model.pattern)]
    halves = {key: share for key, share in weak_halves(scores, model).items() if key[0] >= 0}
    axes = list(dict.fromkeys(axis for _, axis in halves))
    rows = [[halves.get((i, axis), float("nan")) for axis in axes] for i in range(len(names))]
    return pd.DataFrame(rows, index=names, columns=axes, dtype="float64")


def layers_table(scores: Scores, model: ModelConfig) -> pd.DataFrame:
    """Table for the profile: one row per layer, one column per effect of removing it."""
    names = [f"{i} {letter}" for i, letter in enumerate(model.pattern)]
    return pd.DataFrame({effect: scores.layers(effect) for effect in EFFECTS}, index=names, dtype="float64")


def draw_scores(table: pd.DataFrame, ax: Axes, *, font_pt: float = 8.0) -> None:
    """Draws the heat map; in darker cells the weaker indices hold less of the score.

    Args:
        table: from `scores_table`.
        font_pt: size of the text in points.
    """
    dress(ax, "", "", font_pt)
    ax.grid(visible=False)
    if table.empty or table.shape[1] == 0:
        draw_message(ax, "nothing to show", font_pt)
        return
    sns.heatmap(
        100 * table,
        ax=ax,
        vmin=0,
        vmax=50,
        cmap="mako",
        annot=True,
        fmt=".0f",
        annot_kws={"fontsize": font_pt - 1.5},
        linewidths=0.5,
        cbar=False,
    )
    ax.set_title("Share of the weaker half of the indices (%)", fontsize=font_pt, color=INK, loc="left")
    ax.tick_params(axis="x", labelrotation=45, labelsize=font_pt - 0.5, length=0)
    for label in ax.get_xticklabels():
        label.set_horizontalalignment("right")
        label.set_rotation_mode("anchor")
    ax.tick_params(axis="y", labelrotation=0, labelsize=font_pt - 0.5, length=0)


def draw_layers(table: pd.DataFrame, ax: Axes, effect: str = "kl", *, font_pt: float = 8.0) -> None:
    """Draws the effect of removing each layer, on a log axis, in the rows of the heat map.

    Args:
        table: from `layers_table`.
        effect: one of `EFFECTS`.
        font_pt: size of the text in points.
    """
    dress(ax, EFFECTS[effect], "", font_pt)
    values = table[effect].where(table[effect] > 0) if effect in table else pd.Series(dtype="float64")
    if values.dropna().empty:
        draw_message(ax, "nothing to show", font_pt)
        return
    rows = [i + 0.5 for i in range(len(values))]
    low = float(values.min()) / 2
    ax.set_xscale("log")
    ax.hlines(rows, low, values.fillna(low), color=LINE, linewidth=0.08 * font_pt)
    ax.plot(values, rows, "o", color=sns.color_palette("colorblind")[0], ms=0.55 * font_pt, mec="white")
    ax.set(xlim=(low, float(values.max()) * 1.5), ylim=(len(values), 0), yticks=[])
    ax.grid(visible=False, axis="y")
    ax.set_title("Without the layer", fontsize=font_pt, color=INK, loc="left")


def plot_scores(
    scores: Scores,
    model: ModelConfig,
    run: str,
    effect: str = "kl",
    *,
    width: float = README_WIDTH,
    height: float | None = None,
    title: str | None = None,
) -> RunFigure:
    """Plots a heat map of layers and axes, and beside it the effect of removing each layer.

    Args:
        run: name of the parent.
        width: inches.
        height: inches; None follows the number of layers.
        title: drawn above the axes if given.
    """
    font_pt = text_pt(width)
    table = scores_table(scores, model)
    rows = font_pt / 72 * (8 + 1.8 * max(len(table), 3))
    figure = RunFigure(width, height or rows, title or "Scores of a trained parent", [run])
    if title:
        figure.suptitle(title, fontsize=font_pt + 1)
    left, right = figure.subplots(1, 2, width_ratios=(max(2.0, 0.5 * table.shape[1]), 2.0))
    draw_scores(table, left, font_pt=font_pt)
    draw_layers(layers_table(scores, model), right, effect, font_pt=font_pt)
    return figure
