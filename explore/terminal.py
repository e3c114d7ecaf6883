"""The terminal, where every console prints text as it is, and the cell of a notebook, where HTML takes its place."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from rich.console import Console

NOTEBOOK_EVERY_S = 0.25
"""Seconds between two changes of what a notebook shows."""


def plain_console(*, stderr: bool = True, **options: Any) -> Console:
    """A console that takes no part of a text for markup or for an emoji.

    Names, folders, prompts and reasons may hold `[red]`, `[/]` or `:rocket:`; they are printed with every letter. Style
    is given beside the text, by `style=` or as a `rich.text.Text`.

    Args:
        stderr: print to standard error, else to standard output.
        options: of `rich.console.Console`.
    """
    return Console(stderr=stderr, markup=False, emoji=False, **options)


def replace_unprintable() -> None:
    """Lets standard output and standard error print a `?` for what a terminal's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


BARS = " ▁▂▃▄▅▆▇█"


def bars(values: Sequence[float], height: int = 1) -> list[str]:
    """A curve as bars of text, one column a value: the lowest value is the lowest bar, the highest fills all rows.

    Args:
        height: rows, the first above; each has eight steps.
    """
    low, high = min(values), max(values)
    steps = [1 + round((value - low) / ((high - low) or 1) * (8 * height - 1)) for value in values]
    return ["".join(BARS[min(max(step - 8 * row, 0), 8)] for step in steps) for row in reversed(range(height))]


class NotebookOutput:
    """HTML in the output of the cell that runs, replaced as it changes; for a console whose `is_jupyter` is true."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown_s = -NOTEBOOK_EVERY_S

    def is_due(self) -> bool:
        """Whether what was shown last has been there long enough."""
        return time.monotonic() - self._shown_s >= NOTEBOOK_EVERY_S

    def show(self, html: str) -> None:
        """Replaces what is shown."""
        ipython: Any = import_module("IPython.display")  # which has no types
        self._shown_s = time.monotonic()
        if self._handle is None:
            self._handle = ipython.display(ipython.HTML(html), display_id=True)
        else:
            self._handle.update(ipython.HTML(html))
