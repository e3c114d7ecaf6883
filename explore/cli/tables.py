"""Tables that fit the terminal: what has no room beside the rest follows below it, and nothing is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

ENDLESS = 10_000
"""Columns of a terminal on which a table has the width that it needs."""


def plain_table(title: str = "", **options: Any) -> Table:
    """A table without lines, with a dim header and a title above its left corner."""
    return Table(
        title=title or None, title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="dim", **options
    )


def print_fitting(
    console: Console, make: Callable[[str, Sequence[str]], Table], title: str, fields: Sequence[str]
) -> None:
    """Prints a table in as few parts, one below the other, as the width of the terminal allows.

    Args:
        make: a table with a title and some of the fields; what names its rows is in every part.
        fields: columns, of which each part has some, in this order.
    """
    tables: list[Table] = []
    for n in range(1, len(fields) + 1):
        size = math.ceil(len(fields) / n)
        parts = [fields[start : start + size] for start in range(0, len(fields), size)]
        tables = [make(f"{title} (more columns)".strip() if i else title, part) for i, part in enumerate(parts)]
        if size == 1 or all(fits(console, table) for table in tables):
            break
    for table in tables:
        console.print(table)


def fits(console: Console, table: Table) -> bool:
    """Whether the terminal has room for a table with nothing cut or broken."""
    return console.measure(table, options=console.options.update(max_width=ENDLESS)).maximum <= console.width
