"""HTML for notebooks that follows the light and the dark theme of JupyterLab.

Colours without a meaning are JupyterLab's variables, or those of the page if there are none. All styles are inline,
because a reopened notebook does not keep the style sheets of its outputs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

Color = tuple[float, float, float]
"""Red, green and blue, from 0 to 1."""

INK = "var(--jp-ui-font-color1, currentColor)"
SOFT = "var(--jp-ui-font-color2, #767676)"
LINE = "var(--jp-border-color2, #bdbdbd)"
BRAND = "var(--jp-brand-color1, #1976d2)"
MONO = "var(--jp-code-font-family, monospace)"

CURVE_WIDTH, CURVE_HEIGHT = 340, 120
"""Size of a curve in pixels."""

POINTS = 200
"""Maximum number of drawn points of a curve."""


class Html(str):
    """Text that is already HTML. All other text in a table is escaped."""

    __slots__ = ()


class Paint(NamedTuple):
    """A colour for a style sheet, and the text colour that is readable on it."""

    color: str
    ink: str


def paint(rgb: Color) -> Paint:
    """Returns a colour with its text colour: white if the contrast is at least 4.5, else nearly black."""
    linear = [channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in rgb]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    ink = "#fff" if 1.05 / (luminance + 0.05) >= 4.5 else "#111"
    return Paint("#" + "".join(f"{round(255 * channel):02x}" for channel in rgb), ink)


def strip(pattern: str, paints: Mapping[str, Paint], names: Mapping[str, str] | None = None) -> str:
    """A pattern as coloured letters, one per layer.

    Args:
        paints: colours by letter; other letters have a frame and no colour.
        names: names of the kinds of layers by letter, shown as tooltips.
    """
    names = names or {}
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:2px;margin:4px 0">'
        + "".join(chip(letter, paints.get(letter), names.get(letter, "")) for letter in pattern)
        + "</div>"
    )


def chip(letter: str, style: Paint | None, title: str = "") -> Html:
    """A letter on its colour."""
    color, ink = style or (f"transparent;box-shadow:inset 0 0 0 1px {LINE}", INK)
    return Html(
        f'<span title="{escape(title)}" style="display:inline-block;width:1.55em;text-align:center;border-radius:3px;'
        f'background:{color};color:{ink};font:600 13px/1.6 {MONO}">{escape(letter)}</span>'
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """A table of texts.

    Args:
        left: indices of the left-aligned columns (words); the others (numbers) are right-aligned.
    """
    cell = "padding:1px 10px 1px 0;border:0;white-space:pre;background:none"
    aligned = ["text-align:left" if i in left else "text-align:right" for i in range(len(header))]
    head = "".join(
        f'<th style="{cell};{side};color:{SOFT};font-weight:normal;border-bottom:1px solid {LINE}">{_cell(name)}</th>'
        for name, side in zip(header, aligned, strict=True)
    )
    body = "".join(
        '<tr style="background:none">'
        + "".join(f'<td style="{cell};{side}">{_cell(text)}</td>' for text, side in zip(row, aligned, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        '<div style="overflow-x:auto"><table style="border-collapse:collapse;margin:2px 0;font-variant-numeric:'
        f'tabular-nums;color:{INK}">'
        + (f'<thead><tr style="background:none">{head}</tr></thead>' if any(header) else "")
        + f"<tbody>{body}</tbody></table></div>"
    )


def line(text: str, more: str = "") -> str:
    """A line of text with a second part in a softer colour."""
    soft = f' <span style="color:{SOFT}">{escape(more)}</span>' if more else ""
    return f'<div style="color:{INK};margin:2px 0"><b>{escape(text)}</b>{soft}</div>'


def note(text: str) -> str:
    """A line in a softer colour."""
    return f'<div style="color:{SOFT};font-size:90%;margin:2px 0">{escape(text)}</div>'


def block(*parts: str) -> str:
    """Stacks pieces of HTML."""
    return f'<div style="font-family:var(--jp-ui-font-family, sans-serif);font-size:13px">{"".join(parts)}</div>'


def progress(share: float, text: str = "") -> str:
    """A progress bar, filled to a share from 0 to 1, with a text beside it."""
    percent = 100 * min(1.0, max(0.0, share))
    return (
        f'<div style="display:flex;align-items:center;gap:8px;margin:4px 0;color:{INK}">'
        f'<div role="progressbar" aria-valuenow="{percent:.0f}" style="flex:none;width:180px;height:8px;'
        f'border-radius:4px;overflow:hidden;background:{LINE}">'
        f'<div style="width:{percent:.1f}%;height:100%;background:{BRAND}"></div></div>'
        f'<span style="font-variant-numeric:tabular-nums">{escape(text)}</span></div>'
    )


def curve(points: Sequence[tuple[float, float]], x_label: str, y_label: str, ends: tuple[str, str]) -> str:
    """A curve as inline SVG. The vertical axis spans the values after the first tenth.

    Args:
        points: points by rising x; those that are not finite are omitted.
        ends: labels of the two ends of the horizontal axis.

    Returns:
        The SVG, or "" if fewer than two points are finite.
    """
    points = [point for point in points if all(map(math.isfinite, point))]
    if len(points) < 2:
        return ""
    points = [*points[: -1 : max(1, len(points) // POINTS)], points[-1]]
    settled = [y for _, y in points[len(points) // 10 :]]
    low, high = min(settled), max(settled)
    high = high if high > low else low + max(abs(low), 1.0) * 0.01
    x0, x1 = points[0][0], points[-1][0] if points[-1][0] > points[0][0] else points[0][0] + 1
    left, right, top, bottom = 46, CURVE_WIDTH - 8, 8, CURVE_HEIGHT - 30
    path = " ".join(
        f"{left + (right - left) * (x - x0) / (x1 - x0):.1f},"
        f"{bottom - (bottom - top) * (min(y, high) - low) / (high - low):.1f}"
        for x, y in points
    )
    words = (
        (left, CURVE_HEIGHT - 17, "start", ends[0]),
        (right, CURVE_HEIGHT - 17, "end", ends[1]),
        ((left + right) / 2, CURVE_HEIGHT - 5, "middle", x_label),
        (left - 4, top + 8, "end", f"{high:.4g}"),
        (left - 4, bottom, "end", f"{low:.4g}"),
    )
    texts = "".join(
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>' for x, y, anchor, text in words
    )
    return (
        f'<svg role="img" aria-label="{escape(y_label)}" width="{CURVE_WIDTH}" height="{CURVE_HEIGHT}" '
        f'viewBox="0 0 {CURVE_WIDTH} {CURVE_HEIGHT}" style="max-width:100%;font:11px sans-serif;fill:{SOFT}">'
        f'<path d="M{left},{top}V{bottom}H{right}" fill="none" stroke="{LINE}"/>'
        f'<polyline points="{path}" fill="none" style="stroke:{BRAND}" stroke-width="1.6" stroke-linejoin="round"/>'
        f"{texts}</svg>"
    )


def _cell(text: str) -> str:
    return text if isinstance(text, Html) else escape(text)
