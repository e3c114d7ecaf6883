"""The `watch` command: show a study live in the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from explore.cli.app import app, out
from explore.cli.options import StudyName, StudyStorage
from explore.cli.rules import Apart


@app.command(
    rich_help_panel="Train and search",
    epilog="Example: explore watch runs/first_frontier, while a sweep works on it",
    rules=(Apart("--once", "--every"), Apart("--study", "--storage")),
)
def watch(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A folder of runs, or a journal file.")],
    storage: StudyStorage = None,
    name: StudyName = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Exit after this many trials (default: the sweep's --trials).")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print the table once and exit.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between updates.")] = 2.0,
) -> None:
    """Show a study live, from any terminal: its trials, the front, and the learning curves of validated runs.

    Columns that do not fit are left out, the curves last. A study that has all its trials is printed once. Ctrl-C stops
    watching and does not affect the study.
    """
    from explore.study.watching import find_study
    from explore.study.watching import watch as watch_study

    watch_study(find_study(study, storage, name).study, out, trials, once=once, every_s=every)
