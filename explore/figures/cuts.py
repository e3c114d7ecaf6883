"""Figure of a cut: how much of each layer of its parent a child keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from explore.figures.axes import INK, draw_message, dress
from explore.figures.base import README_WIDTH, Color, RunFigure, text_pt
from explore.figures.panels import outside_legend

if TYPE_CHECKING:
    from explore.compress.alignment import Alignment

STATES = ("kept", "narrower", "fused", "open: mean over all ways", "left out")
"""States of a layer; `open` if the child's pattern does not determine whether the layer was kept."""


def cut_table(alignment: Alignment) -> pd.DataFrame:
    """Table for the figure: one row per layer of the parent.

    Returns:
        Columns layer, kind, share (parameters kept, divided by those of the layer; for an open layer the mean over all
        alignments of the two patterns) and state, one of `STATES`.
    """
    most: dict[str, float] = {}
    for part in alignment.parts:
        most[part.block.kind] = max(part.share, most.get(part.block.kind, 0.0))
    rows = []
    for part in alignment.parts:
        kept = "fused" if part.fused else "narrower" if part.share < 1 else "kept"
        state = STATES[3] if part.is_open else "left out" if part.kept_in == 0 else kept
        share = most[part.block.kind] * part.kept_in if part.is_open else part.share
        rows.append((part.layer, part.block.kind, share, state))
    return pd.DataFrame(rows, columns=["layer", "kind", "share", "state"])


def draw_cut(table: pd.DataFrame, ax: Axes, kind: str, *, font_pt: float = 8.0) -> None:
    """Draws the layers of one kind: bars for the share of parameters, crosses for layers left out.

    Args:
        table: from `cut_table`.
        font_pt: size of the text in points.
    """
    dress(ax, "", kind.replace("_", " "), font_pt)
    rows = table[table["kind"] == kind]
    if rows.empty:
        draw_message(ax, "nothing to show", font_pt)
        return
    apart = min(float(some["layer"].diff().min()) if len(some) > 1 else 1.0 for _, some in table.groupby("kind"))
    for state, color in _colors().items():
        some = rows[rows["state"] == state]
        if state == "left out":
            ax.plot(some["layer"], [4.0] * len(some), "x", color=color, ms=0.35 * font_pt, mew=0.09 * font_pt)
        else:
            ax.bar(some["layer"], 100 * some["share"], width=0.85 * apart, color=color)
    ax.set(ylim=(0, 105), yticks=[0, 50, 100])
    ax.set_xlim(-1, float(table["layer"].max()) + 1)
    ax.grid(visible=False, axis="x")


def plot_cut(
    alignment: Alignment,
    parent: str,
    child: str,
    *,
    width: float = README_WIDTH,
    height: float | None = None,
    title: str | None = None,
) -> RunFigure:
    """Plots how much of each layer of its parent a child keeps, with one row of panels per kind of layer.

    Args:
        parent: name of the parent.
        child: name of the child.
        width: inches.
        height: inches; None follows the number of kinds.
        title: drawn above the axes if given.
    """
    font_pt, table = text_pt(width), cut_table(alignment)
    kinds = list(dict.fromkeys(table["kind"]))
    rows = font_pt / 72 * (6 + 7 * len(kinds))
    figure = RunFigure(width, height or rows, title or f"{child} as a cut of {parent}", [parent, child], "models")
    if title:
        figure.suptitle(title, fontsize=font_pt + 1)
    axes = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for kind, ax in zip(kinds, axes, strict=True):
        draw_cut(table, ax, kind, font_pt=font_pt)
    axes[-1].set_xlabel(f"Layer of {parent}", fontsize=font_pt, color=INK)
    figure.supylabel("Parameters kept (%)", fontsize=font_pt, color=INK)
    figure.align_ylabels(axes)
    present = set(table["state"])
    handles = [
        Line2D([], [], ls="", marker="x", color=color, ms=0.45 * font_pt, label=state)
        if state == "left out"
        else Patch(color=color, label=state)
        for state, color in _colors().items()
        if state in present
    ]
    outside_legend(figure, handles, font_pt)
    return figure


def _colors() -> dict[str, Color]:
    palette = sns.color_palette("colorblind")
    return dict(zip(STATES, (palette[0], palette[9], palette[2], (0.75, 0.75, 0.75), palette[3]), strict=True))
