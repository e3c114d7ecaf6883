"""Figures of runs, each in three pieces: a table of exactly what is drawn, its drawing on axes, and a thin `plot_`."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path as FilePath

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox, BboxBase

from explore.frontier import Floats, pareto_front
from explore.files import replacing

COLUMN_WIDTH, COLUMN_HEIGHT = 3.35, 2.6
"""Inches of a figure in one column of a paper."""

README_WIDTH, README_HEIGHT = 6.5, 4.0
"""Inches of a figure on a page of its own width."""

LABELS: Mapping[str, str] = {
    "flops_run": "Training FLOPs",
    "flops_train": "Training FLOPs per token",
    "flops_fwd": "Forward FLOPs per token",
    "params_total": "Parameters",
    "params_active": "Active parameters",
    "tokens": "Training tokens",
    "step": "Optimizer steps",
    "train_s": "Training time (s)",
    "tokens_per_s": "Training throughput (tokens/s)",
    "kv_bytes_per_token": "KV cache (bytes per token)",
    "ssm_state_bytes": "SSM state (bytes per sequence)",
    "val_bpb": "Validation bits per byte",
    "test_bpb": "Test bits per byte",
    "val_loss": "Validation loss (nats per token)",
    "train_loss": "Training loss (nats per token)",
    "recall": "Recall accuracy",
}
"""Axis label of a column; another column is labelled with its name."""

MORE_IS_BETTER = frozenset({"recall", "tokens_per_s"})
"""Columns of which a front takes the largest values."""

FAMILIES = ("attention + MLP", "Mamba hybrid", "hybrid MoE", "hybrid LatentMoE", "pure Mamba", "recall")
"""Families with a colour and a marker of their own, the same in every figure; others get the next."""

MARKERS = ("s", "o", "^", "D", "v", "P", "X", "<", ">", "p", "h")
_COLOR_ORDER = (0, 1, 2, 4, 9, 5, 3, 7, 6, 8)  # of seaborn's palette: what is hard to tell apart comes far apart
_UNTOLD = {"run": "", "family": "other", "pattern": ""}
_EVEN = {"^": 1.2, "v": 1.2, "<": 1.2, ">": 1.2, "D": 0.9}  # of a marker's size, so that all look equally large
_TICKS = ((1,), (1, 3), (1, 2, 5), (1, 2, 4), (1, 2, 4, 6, 8), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8))
_INK, _LINE, _GRID = "0.15", "0.45", "0.92"
_NEAR = ((-0.5, -0.35), (0.0, -0.7), (-0.7, 0.0), (0.5, -0.35))
_FAR = tuple((dx, -0.4 - 0.8 * row) for row in range(1, 10) for dx in (-0.6 * row, 0.0, 0.5, 1 + 0.6 * row))
_PLACES = (*_NEAR, *_FAR, (-0.5, 0.4), (0.0, 0.7), (0.5, 0.4))


class RunFigure(Figure):
    """A figure that knows its title and the runs it shows, for the metadata of its files, and that Jupyter displays."""

    def __init__(self, width: float, height: float, title: str, runs: Iterable[str]) -> None:
        super().__init__(figsize=(width, height), layout="constrained")
        self.title, self.runs = title, tuple(dict.fromkeys(map(str, runs)))
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=144)
        return content.getvalue()


@dataclass(frozen=True)
class FamilyStyle:
    """How the points of a family are drawn: an RGB colour, a lighter one for runs off the front, and a marker."""

    color: tuple[float, float, float]
    light: tuple[float, float, float]
    marker: str


def family_styles(families: Iterable[str]) -> dict[str, FamilyStyle]:
    """The style of each family, in the order of a legend; those not in `FAMILIES` follow in alphabetical order."""
    present = set(families)
    palette = sns.color_palette("colorblind")
    styles = {}
    for i, family in enumerate([*FAMILIES, *sorted(present.difference(FAMILIES))]):
        red, green, blue = palette[_COLOR_ORDER[i % len(_COLOR_ORDER)]]
        light = (0.3 * red + 0.7, 0.3 * green + 0.7, 0.3 * blue + 0.7)
        styles[family] = FamilyStyle((red, green, blue), light, MARKERS[i % len(MARKERS)])
    return {family: style for family, style in styles.items() if family in present}


def frontier_table(runs: pd.DataFrame, x: str = "flops_run", y: str = "val_bpb") -> pd.DataFrame:
    """What a frontier figure draws: the finished runs with both values, by rising cost.

    Args:
        runs: a table as `load_runs` gives it; where it has a `status`, only finished runs are drawn.
        x: the cost column; less is better.
        y: the quality column; less is better, except for the columns of `MORE_IS_BETTER`.

    Returns:
        Columns run, family, pattern, `x`, `y` and on_front.

    Raises:
        ValueError: a column is missing.
    """
    table = _known(runs, x, y)
    quality = -table[y] if y in MORE_IS_BETTER else table[y]
    table["on_front"] = pareto_front(pd.DataFrame({"cost": table[x], "error": quality}), "cost", "error")
    return table.assign(quality=quality).sort_values([x, "quality", "run"], ignore_index=True).drop(columns="quality")


def draw_frontier(table: pd.DataFrame, ax: Axes, *, font_pt: float = 8.0) -> None:
    """Draws a frontier table: runs by family, the front as a step line, its members solid and labelled by pattern.

    Args:
        table: from `frontier_table`; its fourth and fifth columns are the axes.
        font_pt: size of the text in points; the markers follow it.
    """
    x, y = map(str, table.columns[3:5])
    front = table[table["on_front"]]
    sign = -1 if y in MORE_IS_BETTER else 1
    if not _dress(ax, table, font_pt, left=_label_room(ax, table, font_pt), side=sign):
        return
    ax.plot(front[x], front[y], drawstyle="steps-post", color=_LINE, lw=0.11 * font_pt, zorder=2, label="Pareto front")
    handles = []
    for family, style in family_styles(table["family"]).items():
        size = 0.62 * font_pt * _EVEN.get(style.marker, 1.0)
        for on_front in (False, True):
            rows = table[(table["family"] == family) & (table["on_front"] == on_front)]
            ax.scatter(
                rows[x], rows[y], s=size**2, marker=style.marker, facecolor=style.color if on_front else style.light,
                edgecolor=style.color, linewidth=0.08 * font_pt, zorder=4 if on_front else 3,
                label=family if on_front else f"{family}, off the front",
            )  # fmt: skip
        handles.append(Line2D([], [], marker=style.marker, ls="", ms=size, color=style.color, label=family))
    if len(front) > 1:
        handles.append(Line2D([], [], color=_LINE, lw=0.11 * font_pt, label="Pareto front"))
    _legend(ax, handles, font_pt)
    _label_front(ax, table, sign, font_pt)


def plot_frontier(
    runs: pd.DataFrame,
    x: str = "flops_run",
    y: str = "val_bpb",
    *,
    width: float = README_WIDTH,
    height: float = README_HEIGHT,
    title: str | None = None,
) -> RunFigure:
    """The runs' quality against their cost, with the Pareto front.

    Args:
        width: inches; text is 7 points up to a paper's column and 8.5 points on a page.
        height: inches.
        title: drawn above the axes; there is none unless asked for.
    """
    table = frontier_table(runs, x, y)
    figure, ax, font_pt = _figure(table, x, y, width, height, title)
    draw_frontier(table, ax, font_pt=font_pt)
    return figure


def curves_table(metrics: pd.DataFrame, x: str = "flops_run", y: str = "val_bpb") -> pd.DataFrame:
    """What a figure of learning curves draws: the rows with both values, by run and rising `x`.

    Args:
        metrics: a table as `load_metrics` gives it.

    Returns:
        Columns run, family, pattern, `x` and `y`.

    Raises:
        ValueError: a column is missing.
    """
    return _known(metrics, x, y).sort_values(["run", x], ignore_index=True, kind="stable")


def draw_curves(table: pd.DataFrame, ax: Axes, *, font_pt: float = 8.0) -> None:
    """Draws a table of learning curves: one line a run in the colour of its family, a marker where it ends.

    Args:
        table: from `curves_table`; its fourth and fifth columns are the axes.
        font_pt: size of the text in points; lines and markers follow it.
    """
    x, y = map(str, table.columns[3:5])
    if not _dress(ax, table, font_pt):
        return
    handles = []
    for family, style in family_styles(table["family"]).items():
        look = {
            "color": style.color,
            "marker": style.marker,
            "ms": 0.55 * font_pt,
            "mec": "white",
            "mew": 0.06 * font_pt,
        }
        for run, rows in table[table["family"] == family].groupby("run", sort=True):
            ax.plot(rows[x], rows[y], lw=0.12 * font_pt, markevery=[-1], label=str(run), **look)  # type: ignore[arg-type]
        handles.append(Line2D([], [], lw=0.12 * font_pt, label=family, **look))  # type: ignore[arg-type]
    _legend(ax, handles, font_pt)


def plot_curves(
    metrics: pd.DataFrame,
    x: str = "flops_run",
    y: str = "val_bpb",
    *,
    width: float = README_WIDTH,
    height: float = README_HEIGHT,
    title: str | None = None,
) -> RunFigure:
    """The runs' learning curves, by family; the arguments are those of `plot_frontier`."""
    table = curves_table(metrics, x, y)
    figure, ax, font_pt = _figure(table, x, y, width, height, title)
    draw_curves(table, ax, font_pt=font_pt)
    return figure


def save_figure(figure: Figure, path: str | FilePath) -> tuple[FilePath, FilePath]:
    """Writes a figure as PNG (300 dots per inch) and SVG beside each other, the same bytes for the same figure.

    The title, the number of runs and their names, and the software stand in the metadata of both files.

    Args:
        path: of either file, or of both without a suffix.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        ValueError: another suffix.
    """
    path = FilePath(path)
    if path.suffix not in ("", ".png", ".svg"):
        raise ValueError(f"figure: cannot write {str(path)!r}; the suffix must be .png or .svg, and both are written")
    title, runs = (figure.title, figure.runs) if isinstance(figure, RunFigure) else (path.stem, ())
    described = {"Title": title, "Description": f"{len(runs)} runs" + (f": {', '.join(runs)}" if runs else "")}
    software = f"hybrid-frontier, Matplotlib {matplotlib.__version__}"
    png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
    with matplotlib.rc_context({"svg.hashsalt": "hybrid-frontier"}):
        with replacing(png) as temporary:
            figure.savefig(temporary, format="png", dpi=300, metadata={**described, "Software": software})
        with replacing(svg) as temporary:
            figure.savefig(temporary, format="svg", metadata={**described, "Creator": software, "Date": None})
    return png, svg


def _known(table: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """Columns run, family, pattern, x and y of the finished rows in which x and y are finite."""
    if x == y:
        raise ValueError(f"y: must be another column than x, got {y!r}")
    if missing := [column for column in ("run", "family", "pattern", x, y) if column not in table]:
        have = ", ".join(map(str, table.columns)) or "none"
        raise ValueError(f"column {missing[0]!r} is not in the table of runs; its columns: {have}")
    if "status" in table:
        table = table[table["status"].eq("finished").fillna(False).astype(bool)]
    texts = {column: table[column].astype("str").fillna(other) for column, other in _UNTOLD.items()}
    numbers = {column: pd.to_numeric(table[column], errors="coerce").astype("float64") for column in (x, y)}
    known = pd.DataFrame({**texts, **numbers})
    return known.replace([np.inf, -np.inf], np.nan).dropna(subset=[x, y]).reset_index(drop=True)


def _figure(
    table: pd.DataFrame, x: str, y: str, width: float, height: float, title: str | None
) -> tuple[RunFigure, Axes, float]:
    figure = RunFigure(width, height, title or f"{LABELS.get(y, y)} against {LABELS.get(x, x)}", table["run"])
    font_pt = 7.0 if width < 4.5 else 8.5
    if title:
        figure.suptitle(title, fontsize=font_pt + 1)
    return figure, figure.add_subplot(), font_pt


def _dress(ax: Axes, table: pd.DataFrame, font_pt: float, left: float = 0.05, side: int = 0) -> bool:
    """Scales, labels and grid of the axes; says whether there is anything to draw on them.

    Args:
        left: room left of the points, as a part of what they span.
        side: where labels need room: below the points (1), above them (-1) or nowhere (0).
    """
    x, y = map(str, table.columns[3:5])
    ax.set_xlabel(LABELS.get(x, x), fontsize=font_pt, color=_INK)
    ax.set_ylabel(LABELS.get(y, y), fontsize=font_pt, color=_INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set(color=_LINE, linewidth=0.6)
    ax.tick_params(which="both", labelsize=font_pt - 0.5, color=_LINE, labelcolor=_INK, width=0.6, length=2.5)
    ax.tick_params(which="minor", length=1.5)
    ax.set_axisbelow(True)
    if table.empty:
        ax.set(xticks=[], yticks=[])
        ax.text(0.5, 0.5, "no finished runs", transform=ax.transAxes, ha="center", va="center", fontsize=font_pt + 1,
                color=_LINE)  # fmt: skip
        return False
    ax.grid(color=_GRID, linewidth=0.6)
    low, high = _span(table[y])
    ax.set_ylim(low - (0.2 if side > 0 else 0.06) * (high - low), high + (0.2 if side < 0 else 0.06) * (high - low))
    if _is_log(table[x]):
        _log_axis(ax, table[x], left)
    else:
        low, high = _span(table[x])
        ax.set_xlim(low - left * (high - low), high + 0.05 * (high - low))
    return True


def _span(values: pd.Series[float]) -> tuple[float, float]:
    """The range of the values, widened to a hundredth of their size."""
    low, high = float(values.min()), float(values.max())
    half = max(high - low, 0.01 * max(abs(low), abs(high)), 1e-9) / 2
    return (low + high) / 2 - half, (low + high) / 2 + half


def _is_log(costs: pd.Series[float]) -> bool:
    return bool((costs > 0).all())  # a cost of zero, such as an attention-free model's KV cache, has no logarithm


def _log_axis(ax: Axes, costs: pd.Series[float], left: float) -> None:
    """A log axis over a factor of two or more, with three labelled ticks or more."""
    low, high = float(np.log10(costs.min())), float(np.log10(costs.max()))
    middle, span = (low + high) / 2, max(high - low, math.log10(2))
    start, end = 10 ** (middle - (0.5 + left) * span), 10 ** (middle + 0.55 * span)
    ax.set_xscale("log")
    ax.set_xlim(start, end)
    ticks: list[float] = []
    for steps in _TICKS:
        decades = range(math.floor(math.log10(start)), math.ceil(math.log10(end)) + 1)
        ticks = [tick for decade in decades for step in steps if start <= (tick := step * 10.0**decade) <= end]
        if len(ticks) >= 3:
            break
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FuncFormatter(_power_of_ten))
    ax.xaxis.set_minor_locator(LogLocator(subs=range(2, 10)))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _power_of_ten(value: float, position: int | None = None) -> str:
    exponent = int(np.floor(np.log10(value) + 1e-9))
    factor = f"{value / 10.0**exponent:.3g}"
    if 0 <= exponent < 4:
        return f"{value:.4g}"
    return rf"$10^{{{exponent}}}$" if factor == "1" else rf"${factor}\times10^{{{exponent}}}$"


def _legend(ax: Axes, handles: list[Line2D], font_pt: float) -> None:
    """A legend above the axes, in as many even columns as find room."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    for rows in range(1, len(handles) + 1):
        legend = ax.legend(
            handles=handles, ncols=math.ceil(len(handles) / rows), loc="lower left", bbox_to_anchor=(0, 1.02),
            fontsize=font_pt - 0.5, frameon=False, borderaxespad=0, borderpad=0.2, handlelength=1.3, handletextpad=0.4,
            columnspacing=1.0, labelcolor=_INK,
        )  # fmt: skip
        legend.set_in_layout(False)  # while it may be wider than the axes, which would squeeze them
        figure.draw_without_rendering()
        axes, width = ax.get_window_extent(), legend.get_window_extent().width
        legend.set_in_layout(True)
        if width <= axes.width:
            return
        if width <= axes.x1 - ax.yaxis.label.get_window_extent().x0:  # begins above the label of the y axis
            legend.set_loc("lower right")
            legend.set_bbox_to_anchor((1, 1.02), ax.transAxes)
            return


def _label_room(ax: Axes, table: pd.DataFrame, font_pt: float) -> float:
    """Room that the labels of the front need left of the points, as a part of what the points span."""
    front, x = table[table["on_front"]], str(table.columns[3])
    if front.empty:
        return 0.05
    costs = np.log10(table[x]) if _is_log(table[x]) else table[x]
    along = (costs[table["on_front"]] - costs.min()) / max(float(costs.max() - costs.min()), math.log10(2))
    letters = front["pattern"].str.len() + 1.5  # a letter of the monospaced font is 0.6 of its size wide
    share = 0.6 * (font_pt - 1) * letters / (ax.get_window_extent().width * 72 / ax.figure.dpi)
    return float(((1.05 * share - along) / (1 - share.clip(upper=0.5))).clip(0.08, 0.4).max())


def _label_front(ax: Axes, table: pd.DataFrame, sign: int, font_pt: float) -> None:
    """Labels front members, on the side of the front where no run can be; one without a readable place has no label."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # settles the layout, on which the places depend
    pixel, columns, front = figure.dpi / 72, list(table.columns[3:5]), table[table["on_front"]]
    texts = [
        ax.annotate(
            label, (x, y), (0, 0), textcoords="offset points", fontsize=font_pt - 1, color=_INK, family="monospace",
            parse_math=False, zorder=5,
        )
        for label, x, y in front[["pattern", *columns]].itertuples(index=False)
    ]  # fmt: skip
    corners, unit = ax.transData.transform(front[columns]), np.array([1, sign]) * font_pt * pixel
    sizes = [np.array([extent.width, extent.height]) for extent in (text.get_window_extent() for text in texts)]
    arranged: list[dict[int, tuple[float, float]]] = []
    for order in (range(len(texts)), reversed(range(len(texts)))):
        crowd = _Crowd(ax.get_window_extent(), ax.transData.transform(table[columns]), corners, 0.4 * unit[0])
        places = {i: crowd.place(corners[i], sizes[i], unit) for i in order}
        arranged.append({i: place for i, place in places.items() if place is not None})
    best = max(arranged, key=lambda places: (len(places), -sum(map(_PLACES.index, places.values()))))
    for i, text in enumerate(texts):
        if i not in best:
            text.remove()
            continue
        dx, dy = best[i][0] * font_pt, best[i][1] * sign * font_pt
        text.set_in_layout(False)
        text.set_position((dx, dy))
        text.set_horizontalalignment("right" if dx < 0 else "left" if dx > 0 else "center")
        text.set_verticalalignment("top" if dy < 0 else "bottom" if dy > 0 else "center")
        if best[i] in _FAR:
            line = ax.annotate(
                "", text.xy, (dx, dy), textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": _LINE, "lw": 0.5, "shrinkA": 0, "shrinkB": 0.35 * font_pt},
            )  # fmt: skip
            line.set_in_layout(False)


class _Crowd:
    """What labels should not hide, in pixels: points, the step line of the front, and the labels placed so far."""

    def __init__(self, frame: BboxBase, points: Floats, front: Floats, radius: float) -> None:
        self.frame, self.radius = frame, radius
        self.boxes = [Bbox([point - radius, point + radius]) for point in points]
        self.lines = [Path([(x0, y0), (x1, y0), (x1, y1)]) for (x0, y0), (x1, y1) in pairwise(front)]

    def place(self, point: Floats, size: Floats, unit: Floats) -> tuple[float, float] | None:
        """Takes the place, of `_PLACES`, where a label of this size hides least, if it is readable there.

        Args:
            unit: pixels of a step to the right and up.
        """
        hidden = [self._hidden(point, np.array(place) * unit, size, far=place in _FAR) for place in _PLACES]
        best = _PLACES[int(np.argmin(hidden))]  # the first of equals
        if min(hidden) > 0.04 * size.prod():
            return None
        way = np.array(best) * unit
        self.boxes.append(_box(point + way, size, way))
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
    """The box of a label that lies from its anchor on in the direction of its way."""
    start = anchor + size * (np.sign(way) - 1) / 2
    return Bbox([start, start + size])


def _overlap(a: Bbox, b: BboxBase) -> float:
    """Area that two boxes share, in square pixels."""
    both = Bbox.intersection(a, b)
    return 0.0 if both is None else float(both.width * both.height)
