"""A bar on the terminal for work that turns out to take long."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

PATIENCE_S = 2.0
REFRESH_S = 0.1


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes how much is done; the bar shows itself after two seconds.

    Args:
        total: how much there is to do; None where that is unknown.
    """
    start = shown = time.monotonic()
    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(escape(label), total=total)

    def report(done: int) -> None:
        nonlocal shown
        if (now := time.monotonic()) - shown < REFRESH_S:
            return
        shown = now
        bar.update(task, completed=done)
        if sys.stderr.isatty() and now - start > PATIENCE_S:
            bar.start()

    try:
        yield report
    finally:
        if bar.live.is_started:  # stopping prints an empty line otherwise
            bar.stop()
