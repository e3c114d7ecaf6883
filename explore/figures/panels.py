"""Shared by the figures of models: panels of bars or rows, a legend above them, and a style per model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from explore.figures.axes import INK
from explore.figures.base import COLOR_ORDER, EVEN, MARKERS, Color, RunFigure, text_pt

_DASHES = ("-", (0, (5, 1.2)), (0, (2, 1)), (0, (5, 1, 1, 1)))


@dataclass(frozen=True)
class LineStyle:
    """Style of a line: three cues, each of which is enough to distinguish it from its neighbours."""

    color: Color
    marker: str
    dashes: str | tuple[int, tuple[float, ...]]

    def look(self, font_pt: float, *, line: bool = True) -> Mapping[str, Any]:
        """Matplotlib arguments for a line, or for its markers alone, with sizes that follow the text."""
        return {
            "color": self.color,
            "ls": self.dashes if line else "",
            "lw": 0.16 * font_pt,
            "marker": self.marker,
            "ms": 0.55 * font_pt * EVEN.get(self.marker, 1.0),
            "mec": "white",
            "mew": 0.06 * font_pt,
        }


def line_styles(names: Iterable[str]) -> dict[str, LineStyle]:
    """The style of each name, in the given order."""
    palette = sns.color_palette("colorblind")
    return {
        name: LineStyle(
            palette[COLOR_ORDER[i % len(COLOR_ORDER)]], MARKERS[i % len(MARKERS)], _DASHES[i % len(_DASHES)]
        )
        for i, name in enumerate(dict.fromkeys(names))
    }


def panels(
    n: int, n_rows: int, width: float, height: float | None, title: str | None, otherwise: str, models: Iterable[str]
) -> tuple[RunFigure, list[Axes]]:
    """Makes a figure of `n` panels whose rows are models: side by side on a page, stacked in a column.

    Args:
        n_rows: rows per panel, which set the height if none is given.
        title: drawn above the panels if given.
        otherwise: title in the metadata if none is drawn.
    """
    font_pt = text_pt(width)
    beside = max(1, min(n, 3 if width >= 4.5 else 1))
    above = max(1, math.ceil(n / beside))
    if height is None:
        height = above * font_pt / 72 * (3.5 + 1.9 * max(n_rows, 2)) + font_pt / 72 * (5 if width >= 4.5 else 8)
    figure = RunFigure(width, height, title or otherwise, models, "models")
    if title:
        figure.suptitle(title, fontsize=font_pt + 1)
    axes = [] if n == 0 else list(figure.subplots(above, beside, squeeze=False).flat)
    for ax in axes[n:]:
        ax.remove()
    for i, ax in enumerate(axes[:n]):
        ax.tick_params(axis="y", labelleft=i % beside == 0)
    return figure, axes[:n]


def one_x_label(axes: Sequence[Axes]) -> None:
    """Keeps one shared x label: below the last panel of a column, or below the middle of the last row."""
    if not axes:
        return
    label, last = axes[0].get_xlabel(), [ax for ax in axes if _row(ax) == _row(axes[-1])]
    for ax in axes:
        ax.set_xlabel("")
    last[(len(last) - 1) // 2].set_xlabel(label, x=0.5 if len(last) % 2 else 1.03)


def in_a_row(ax: Axes) -> bool:
    """Whether there are panels beside this one."""
    spec = ax.get_subplotspec()
    return spec is not None and spec.get_gridspec().ncols > 1


def _row(ax: Axes) -> int:
    spec = ax.get_subplotspec()
    return 0 if spec is None else spec.rowspan.start


def outside_legend(figure: RunFigure, handles: Sequence[Artist], font_pt: float) -> None:
    """Draws a legend above all panels (below if there is a title), in as many columns as fit."""
    if not handles:
        return
    place: Literal["outside upper left", "outside lower left"]
    place = "outside lower left" if figure.get_suptitle() else "outside upper left"
    for n_columns in range(len(handles), 0, -1):
        n_rows = math.ceil(len(handles) / n_columns)
        if math.ceil(len(handles) / n_rows) < n_columns:  # as many rows as with fewer columns
            continue
        box = figure.legend(
            handles=handles, ncols=n_columns, loc=place, fontsize=font_pt - 0.5, frameon=False,
            borderaxespad=0.2, borderpad=0.2, handlelength=1.1, handleheight=0.8, handletextpad=0.4,
            columnspacing=1.0, labelspacing=0.35, labelcolor=INK,
        )  # fmt: skip
        box.set_in_layout(False)  # while it may be wider than the figure
        figure.draw_without_rendering()
        box.set_in_layout(True)
        if n_columns == 1 or box.get_window_extent().width <= figure.bbox.width:
            return
        box.remove()
