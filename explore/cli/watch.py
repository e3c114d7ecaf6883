"""Show a study live on the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from explore.cli.app import app, out
from explore.cli.options import StudyName, StudyStorage


@app.command(
    rich_help_panel="Train and search", epilog="Example: explore watch runs/first_frontier, while a sweep works on it"
)
def watch(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A folder of runs, or a journal file.")],
    storage: StudyStorage = None,
    name: StudyName = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Exit after this many trials (default: what the sweep was asked for).")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print the table once and exit.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two drawings.")] = 2.0,
) -> None:
    """Show a study live, from any terminal: its trials, the front and, where a run was validated, its learning curve.

    Columns that have no room are left out, the curves last. A study that has its trials is printed once. Ctrl-C leaves
    the study alone.
    """
    from explore.study.watching import find_study
    from explore.study.watching import watch as watch_study

    watch_study(find_study(study, storage, name).study, out, trials, once=once, every_s=every)
