"""A progress bar in the terminal for work that takes more than two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import Progress, TextColumn

from explore.terminal import plain_console

PATIENCE_S = 2.0
REFRESH_S = 0.1


@contextmanager
def progress(label: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the amount done; the bar appears after two seconds.

    Args:
        total: the total amount; None if unknown.
    """
    start = shown = time.monotonic()
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        *Progress.get_default_columns()[1:],
        console=plain_console(),
        transient=True,
    )
    task = bar.add_task(label, total=total)

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
