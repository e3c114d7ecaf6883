"""Output to terminals, without markup in text, and to notebook cells, as HTML."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

NOTEBOOK_EVERY_S = 0.25
"""Seconds between updates of a notebook's output."""


def plain_console(*, stderr: bool = True, **options: Any) -> Console:
    """Makes a console that does not interpret markup or emoji codes in text.

    Names, folders, prompts and reasons may contain `[red]`, `[/]` or `:rocket:`, which are printed literally. Give
    styles separately, by `style=` or as a `rich.text.Text`.

    Args:
        stderr: whether to print to standard error instead of standard output.
        options: options of `rich.console.Console`.
    """
    return Console(stderr=stderr, markup=False, emoji=False, **options)


def replace_unprintable() -> None:
    """Makes standard output and error print `?` for characters that the terminal's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def c_output_discarded() -> Iterator[None]:
    """Discards what C code writes to standard output in the block, so that it does not end up in JSON or tables.

    HiGHS, the integer program's solver, prints a line of its own for some programs, and no option prevents it.
    """
    import ctypes  # no command needs it to start

    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output
        yield
        return
    flush = ctypes.CDLL(None).fflush
    try:
        sys.stdout.flush()
        flush(None)
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)


BARS = " ▁▂▃▄▅▆▇█"


def bars(values: Sequence[float], height: int = 1) -> list[str]:
    """Draws a curve as bars of text, one column per value, scaled so that the highest value fills all rows.

    Args:
        height: number of rows, top first; each has eight steps.
    """
    low, high = min(values), max(values)
    steps = [1 + round((value - low) / ((high - low) or 1) * (8 * height - 1)) for value in values]
    return ["".join(BARS[min(max(step - 8 * row, 0), 8)] for step in steps) for row in reversed(range(height))]


class NotebookOutput:
    """Updating HTML in the output of the running notebook cell; for a console whose `is_jupyter` is true."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown_s = -NOTEBOOK_EVERY_S

    def is_due(self) -> bool:
        """Whether enough time has passed since the last update."""
        return time.monotonic() - self._shown_s >= NOTEBOOK_EVERY_S

    def show(self, html: str) -> None:
        """Replaces the output."""
        ipython: Any = import_module("IPython.display")  # untyped package
        self._shown_s = time.monotonic()
        if self._handle is None:
            self._handle = ipython.display(ipython.HTML(html), display_id=True)
        else:
            self._handle.update(ipython.HTML(html))
