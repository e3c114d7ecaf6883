"""Commands that show a study: live on the terminal, and as pages of Weights & Biases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from explore.cli.app import app, out

Storage = Annotated[
    str | None, typer.Option(metavar="URL", help="Optuna storage; then STUDY is the name of a study in it.")
]
Name = Annotated[str | None, typer.Option("--study", help="Study of a journal with several; the newest when absent.")]


@app.command(
    rich_help_panel="Train and search", epilog="Example: explore watch runs/first_frontier, while a sweep works on it"
)
def watch(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A folder of runs, or a journal file.")],
    storage: Storage = None,
    name: Name = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Leave when so many have ended; what was asked for when absent.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print how it stands, and leave.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
) -> None:
    """Show a study live, from any terminal: its trials, their learning curves and the front. Ctrl-C leaves it alone."""
    from explore.study.watching import find_study
    from explore.study.watching import watch as watch_study

    watch_study(find_study(study, storage, name).study, out, trials, once=once, every_s=every)


@app.command(
    "wandb-dashboard",
    rich_help_panel="Train and search",
    epilog="Example: explore wandb-dashboard runs/first_frontier --entity my-team --save",
)
def wandb_dashboard(
    place: Annotated[str, typer.Argument(metavar="STUDY_OR_RUNS", help="A folder of runs, or a journal file.")],
    storage: Storage = None,
    name: Name = None,
    project: Annotated[str, typer.Option(help="Project of Weights & Biases.")] = "explore",
    entity: Annotated[str, typer.Option(help="Account or team; the account's own when absent.")] = "",
    output: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Script (.py) or specification (.json); wandb_dashboard.py beside the runs if absent."
        ),
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Make the pages on the server, too; needs a login.")] = False,
) -> None:
    """Write the workspace and the report of a study as code: nothing is sent, unless with --save.

    They show what was mirrored by --wandb: the frontier, learning curves, throughput and the balance of experts. The
    script stands alone: change it and run it, and it makes both pages anew.
    """
    from explore.files import replacing
    from explore.study.mirroring import runs_pages, study_pages
    from explore.study.storage import JOURNAL
    from explore.study.watching import find_study

    if output is not None and output.suffix not in (".py", ".json"):
        raise ValueError(f"--out: {str(output)!r} is neither a script (.py) nor a specification (.json)")
    path = Path(place)
    if storage is None and path.is_dir() and not (path / JOURNAL).exists():
        pages, folder = runs_pages(path, project, entity), path
    else:
        study, runs = find_study(place, storage, name)
        pages, folder = study_pages(study, runs, project, entity), runs or Path()
    specs = pages.specs()
    output = output or folder / "wandb_dashboard.py"
    with replacing(output) as temporary:
        text = pages.script() if output.suffix == ".py" else json.dumps(specs, indent=2) + "\n"
        temporary.write_text(text, encoding="utf-8")
    out.print(f"wrote {output}", highlight=False)
    if save:
        for url in pages.save():
            out.print(f"saved {url}", highlight=False)
