"""Tables that fit the terminal: columns that do not fit continue in further tables below, so none is dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

ENDLESS = 10_000
"""A terminal width at which no table is squeezed."""


def plain_table(title: str = "", **options: Any) -> Table:
    """A table without lines, with a dim header and a left-aligned title."""
    return Table(
        title=title or None, title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="dim", **options
    )


def print_fitting(
    console: Console, make: Callable[[str, Sequence[str]], Table], title: str, fields: Sequence[str]
) -> None:
    """Prints a table in as few stacked parts as the terminal's width allows.

    Args:
        make: makes one part from a title and its fields; each part repeats the columns that name the rows.
        fields: all columns, in the order in which the parts share them out.
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
    """Whether a table fits the terminal with no cell truncated or wrapped."""
    return console.measure(table, options=console.options.update(max_width=ENDLESS)).maximum <= console.width
