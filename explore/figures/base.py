"""Shared by all figures: sizes, the figure class, colours of families, and saving."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import seaborn as sns
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from explore.files import replacing

COLUMN_WIDTH, COLUMN_HEIGHT = 3.35, 2.6
"""Width in inches of a figure in one column of a paper."""

README_WIDTH, README_HEIGHT = 6.5, 4.0
"""Width in inches of a figure as wide as a page."""

FAMILIES = ("attention + MLP", "Mamba hybrid", "hybrid MoE", "hybrid LatentMoE")
"""The first families in a legend. Every family of a pattern keeps its colour and marker in all figures."""

MARKERS = ("s", "o", "^", "D", "v", "P", "X", "<", ">", "p", "h")
EVEN = {"^": 1.2, "v": 1.2, "<": 1.2, ">": 1.2, "D": 0.9}  # factors on the size that make markers look equally large
COLOR_ORDER = (0, 1, 2, 4, 9, 5, 3, 7, 6, 8)  # indices into seaborn's palette; similar colours are far apart

Color = tuple[float, float, float]
"""Red, green and blue, from 0 to 1."""


class RunFigure(Figure):
    """A figure that Jupyter displays, with a title and names of runs for the metadata of its files.

    Attributes:
        runs: distinct names of the runs or models shown.
        noun: what the names denote: `runs` or `models`.
    """

    def __init__(self, width: float, height: float, title: str, runs: Iterable[str], noun: str = "runs") -> None:
        super().__init__(figsize=(width, height), layout="constrained")
        self.title, self.runs, self.noun = title, tuple(dict.fromkeys(map(str, runs))), noun
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=144)
        return content.getvalue()


@dataclass(frozen=True)
class FamilyStyle:
    """How the points of a family are drawn: an RGB colour, a lighter one for runs off the front, and a marker."""

    color: Color
    light: Color
    marker: str


def text_pt(width: float) -> float:
    """Font size in points for a figure `width` inches wide: smaller in a column than on a page."""
    return 7.0 if width < 4.5 else 8.5


def family_styles(families: Iterable[str]) -> dict[str, FamilyStyle]:
    """The style of each family, in the order of a legend; unknown names follow alphabetically."""
    present, order = set(families), list(FAMILIES)
    if not present <= set(order):
        from explore.pattern import families as known  # which needs torch

        order = list(dict.fromkeys([*order, *known(), *sorted(present)]))
    palette = sns.color_palette("colorblind")
    styles = {}
    for i, family in enumerate(order):
        red, green, blue = palette[COLOR_ORDER[i % len(COLOR_ORDER)]]
        light = (0.3 * red + 0.7, 0.3 * green + 0.7, 0.3 * blue + 0.7)
        styles[family] = FamilyStyle((red, green, blue), light, MARKERS[i % len(MARKERS)])
    return {family: style for family, style in styles.items() if family in present}


def save_figure(figure: Figure, path: str | Path, *, pdf: bool = False, about: str = "") -> tuple[Path, ...]:
    """Writes a figure as PNG (300 dots per inch) and SVG beside each other, the same bytes for the same figure.

    The metadata of all files contains the title, the number and names of runs or models, and the software.

    Args:
        path: path of one of the files, or of all without a suffix.
        pdf: whether to write a PDF too.
        about: further text on the data for the metadata.

    Returns:
        The paths of the PNG, the SVG and, if requested, the PDF.

    Raises:
        ValueError: the suffix is a different one.
    """
    path = Path(path)
    suffixes = (".png", ".svg", ".pdf")[: 3 if pdf else 2]
    if path.suffix not in ("", *suffixes):
        allowed, each = " or ".join(suffixes), "both are written" if not pdf else "all are written"
        raise ValueError(f"figure: cannot write {str(path)!r}; the suffix must be {allowed}, and {each}")
    title, noun = path.stem, "runs"
    runs: tuple[str, ...] = ()
    if isinstance(figure, RunFigure):
        title, runs, noun = figure.title, figure.runs, figure.noun
    description = f"{len(runs)} {noun}" + (f": {', '.join(runs)}" if runs else "") + (f"; {about}" if about else "")
    software = f"hybrid-frontier, Matplotlib {matplotlib.__version__}"
    words: dict[str, dict[str, str | None]] = {
        ".png": {"Title": title, "Description": description, "Software": software},
        ".svg": {"Title": title, "Description": description, "Creator": software, "Date": None},
        ".pdf": {"Title": title, "Subject": description, "Creator": software, "CreationDate": None},
    }
    with matplotlib.rc_context({"svg.hashsalt": "hybrid-frontier", "pdf.fonttype": 42}):
        for suffix in suffixes:
            with replacing(path.with_suffix(suffix)) as temporary:
                figure.savefig(temporary, format=suffix[1:], dpi=300, metadata=words[suffix])
    return tuple(path.with_suffix(suffix) for suffix in suffixes)
