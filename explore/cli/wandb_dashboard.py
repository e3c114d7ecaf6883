"""The `wandb-dashboard` command: write the Weights & Biases pages of a study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from explore.cli.app import app, out
from explore.cli.options import StudyName, StudyStorage
from explore.cli.rules import Apart


@app.command(
    "wandb-dashboard",
    rich_help_panel="Train and search",
    epilog="Example: explore wandb-dashboard runs/first_frontier --entity my-team --save",
    rules=(Apart("--study", "--storage"),),
)
def wandb_dashboard(
    place: Annotated[str, typer.Argument(metavar="STUDY_OR_RUNS", help="A folder of runs, or a journal file.")],
    storage: StudyStorage = None,
    name: StudyName = None,
    project: Annotated[str, typer.Option(help="Project of Weights & Biases.")] = "explore",
    entity: Annotated[str, typer.Option(help="Account or team (default: your account).")] = "",
    output: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Script (.py) or specification (.json) to write (default: wandb_dashboard.py in the runs' folder).",
        ),
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Also create the pages on the server; needs a login.")] = False,
) -> None:
    """Write a study's workspace and report as code; nothing is sent without --save.

    The pages show the runs mirrored by --wandb: the frontier, learning curves, throughput and expert balance. The
    script is self-contained: edit and run it to create both pages again.
    """
    from explore.files import replacing
    from explore.study.mirroring import runs_pages, study_pages
    from explore.study.storage import JOURNAL
    from explore.study.watching import find_study

    if output is not None and output.suffix not in (".py", ".json"):
        raise ValueError(f"--out must be a script (.py) or a specification (.json), got {str(output)!r}")
    path = Path(place)
    if storage is None and path.is_dir() and not (path / JOURNAL).exists():
        if name is not None:
            raise ValueError(f"--study: must come with a folder that has a {JOURNAL}, got {str(path)!r}")
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
