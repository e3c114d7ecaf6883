"""Labels of the points of a front, placed so that they cover neither each other nor a point."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox, BboxBase

from explore.figures.axes import INK, LINE
from explore.frontier import Floats
from explore.quantities import quantity

_NEAR = ((-0.5, -0.35), (0.0, -0.7), (-0.7, 0.0), (0.5, -0.35))
_FAR = tuple((dx, -0.4 - 0.8 * row) for row in range(1, 10) for dx in (-0.6 * row, 0.0, 0.5, 1 + 0.6 * row))
_PLACES = (*_NEAR, *_FAR, (-0.5, 0.4), (0.0, 0.7), (0.5, 0.4))


LABELLING = {
    "name": "{}", "d_model": "d{}", "n_experts": "{} experts", "top_k": "top {}", "d_latent": "latent {}",
    "tokens": "{} tokens", "lr": "lr {}", "seed": "seed {}",
}  # fmt: skip
"""Columns that distinguish points with the same pattern, and their form in a label."""


def point_labels(table: pd.DataFrame) -> pd.Series[str]:
    """Returns the labels of points: the pattern; if patterns repeat, the name, or else the settings that differ.

    Args:
        table: a table with a column `pattern`, and any of the columns in `LABELLING`.
    """
    labels = table["pattern"].astype("str")
    for column, words in LABELLING.items():
        if column not in table or labels.is_unique:
            continue
        values = table[column]
        differs = values.groupby(labels).transform("nunique") > 1
        texts = pd.Series([words.format(quantity(column).text(value)) for value in values], index=table.index)
        more = texts if column == "name" else labels + ", " + texts
        labels = labels.where(~differs | values.isna(), more)
    return labels


def label_room(ax: Axes, table: pd.DataFrame, x: str, sign: int, font_pt: float, *, log: bool) -> float:
    """Margin that the labels of the front need on the better side of the points, as a fraction of the points' span.

    Args:
        sign: 1 if lower costs are better, so that labels are left of the points; -1 if they are right.
        log: whether the horizontal axis is logarithmic.
    """
    front = table[table["on_front"]]
    if front.empty:
        return 0.05
    costs = sign * (np.log10(table[x]) if log else table[x])
    width = max(float(costs.max() - costs.min()), math.log10(2) if log else 1e-9)
    along = (costs[table["on_front"]] - costs.min()) / width
    letters = front["label"].str.len() + 1.5  # a letter of the monospaced font is 0.6 of its size wide
    share = 0.6 * (font_pt - 1) * letters / (ax.get_window_extent().width * 72 / ax.figure.dpi)
    return float(((1.05 * share - along) / (1 - share.clip(upper=0.5))).clip(0.08, 0.4).max())


def label_front(ax: Axes, table: pd.DataFrame, x: str, y: str, signs: tuple[int, int], font_pt: float) -> None:
    """Labels the points of the front on its empty side; a point without a readable place gets no label.

    Args:
        signs: for each axis, 1 if lower values are better and -1 if higher ones are.
    """
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # fixes the layout, on which the places depend
    pixel, columns, front = figure.dpi / 72, [x, y], table[table["on_front"]]
    texts = [
        ax.annotate(
            label, (cost, error), (0, 0), textcoords="offset points", fontsize=font_pt - 1, color=INK,
            family="monospace", parse_math=False, zorder=5, path_effects=[withStroke(linewidth=2, foreground="white")],
        )
        for label, cost, error in front[["label", *columns]].itertuples(index=False)
    ]  # fmt: skip
    corners, unit = ax.transData.transform(front[columns]), np.array(signs) * font_pt * pixel
    sizes = [np.array([extent.width, extent.height]) for extent in (text.get_window_extent() for text in texts)]
    half = table["half_width"].fillna(0.0) if "half_width" in table else pd.Series(0.0, table.index)
    bars = [
        Path(ax.transData.transform([(cost, error - each), (cost, error + each)]))
        for cost, error, each in zip(table[x], table[y], half, strict=True)
        if each
    ]
    lines = bars + _thin_lines(ax, table, x, y)
    arranged: list[dict[int, tuple[float, float]]] = []
    for order in (range(len(texts)), reversed(range(len(texts)))):
        crowd = _Crowd(ax.get_window_extent(), ax.transData.transform(table[columns]), corners, 0.4 * font_pt * pixel)
        crowd.lines += lines
        places = {i: crowd.place(corners[i], sizes[i], unit) for i in order}
        arranged.append({i: place for i, place in places.items() if place is not None})
    best = max(arranged, key=lambda places: (len(places), -sum(map(_PLACES.index, places.values()))))
    for i, text in enumerate(texts):
        if i not in best:
            text.remove()
            continue
        dx, dy = (sign * step * font_pt for sign, step in zip(signs, best[i], strict=True))
        text.set_in_layout(False)
        text.set_position((dx, dy))
        text.set_horizontalalignment("right" if dx < 0 else "left" if dx > 0 else "center")
        text.set_verticalalignment("top" if dy < 0 else "bottom" if dy > 0 else "center")
        if best[i] in _FAR:
            line = ax.annotate(
                "", text.xy, (dx, dy), textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": LINE, "lw": 0.5, "shrinkA": 0, "shrinkB": 0.35 * font_pt},
            )  # fmt: skip
            line.set_in_layout(False)


def _thin_lines(ax: Axes, table: pd.DataFrame, x: str, y: str) -> list[Path]:
    """The dashed lines between parents and children and the dotted line of n-gram models, in pixels."""
    lines: list[pd.DataFrame] = []
    if "parent" in table:
        drawn_at = table.set_index("run")[[x, y]]
        lines = [drawn_at.loc[list(pair)] for pair in table.dropna(subset="parent")[["parent", "run"]].to_numpy()]
    if "floor" in table:
        lines.append(table.dropna(subset="floor")[[x, "floor"]])
    return [Path(ax.transData.transform(line.to_numpy(dtype=np.float64))) for line in lines if len(line) > 1]


class _Crowd:
    """Obstacles for labels, in pixels: points, lines, and labels placed so far."""

    def __init__(self, frame: BboxBase, points: Floats, front: Floats, radius: float) -> None:
        self.frame, self.radius = frame, radius
        self.boxes = [Bbox([point - radius, point + radius]) for point in points]
        self.lines = [Path([(x0, y0), (x1, y0), (x1, y1)]) for (x0, y0), (x1, y1) in pairwise(front)]

    def place(self, point: Floats, size: Floats, unit: Floats) -> tuple[float, float] | None:
        """Chooses the place in `_PLACES` where a label of this size covers least, if it is readable there.

        Args:
            unit: pixels of a step to the right and up.
        """
        hidden = [self._hidden(point, np.array(place) * unit, size, far=place in _FAR) for place in _PLACES]
        best = _PLACES[int(np.argmin(hidden))]  # the first if several are equal
        if min(hidden) > 0.04 * size.prod():
            return None
        way = np.array(best) * unit
        self.boxes.append(_box(point + way, size, way).padded(self.radius, 0))
        if best in _FAR:
            self.lines.append(self._leader(point, way))
        return best

    def _hidden(self, point: Floats, way: Floats, size: Floats, *, far: bool) -> float:
        box, area = _box(point + way, size, way), float(size.prod())
        crossings = sum(line.intersects_bbox(box, filled=False) for line in self.lines)
        if far:
            leader = self._leader(point, way)
            crossings += sum(leader.intersects_bbox(other, filled=False) for other in self.boxes)
        outside = area - _overlap(box, self.frame)
        return round(area * crossings + 2 * outside + sum(_overlap(box, other) for other in self.boxes), 3)

    def _leader(self, point: Floats, way: Floats) -> Path:
        start = min(1.5 * self.radius / float(np.hypot(*way)), 0.9)  # outside the marker
        return Path([point + start * way, point + 0.95 * way])


def _box(anchor: Floats, size: Floats, way: Floats) -> Bbox:
    """The box of a label that extends from its anchor in the direction `way`."""
    start = anchor + size * (np.sign(way) - 1) / 2
    return Bbox([start, start + size])


def _overlap(a: Bbox, b: BboxBase) -> float:
    """The overlap of two boxes, in square pixels."""
    both = Bbox.intersection(a, b)
    return 0.0 if both is None else float(both.width * both.height)
