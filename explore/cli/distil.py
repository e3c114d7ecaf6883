"""The `distil` command: distil a child of a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from explore.cli.app import app
from explore.cli.opening import run_option
from explore.cli.options import CheckpointEvery, DataOf, Json, Paths, SetOptions, Wandb
from explore.cli.train import Devices, Strategy, train_and_show


@app.command(rich_help_panel="Train and search", epilog="Example: explore distil plan.json --tokens 5M")
def distil(
    plan: Annotated[Path, typer.Argument(help="A plan that cuts a trained run, in JSON.")],
    tokens: Annotated[int, typer.Option(min=1, metavar="COUNT", help="Tokens to train on, as 5e6 or 5M.")],
    teacher: Annotated[
        Path | None, run_option("A run, or a folder written by explore import (default: the parent).")
    ] = None,
    parent: Annotated[Path | None, run_option("Run that the plan cuts (default: found in --runs).")] = None,
    data: DataOf = None,
    set_: SetOptions = None,
    runs: Annotated[Path, typer.Option(help="Folder of run folders.")] = Path("runs"),
    checkpoint_every: CheckpointEvery = None,
    devices: Devices = 1,
    strategy: Strategy = "auto",
    path: Paths = None,
    wandb: Wandb = None,
    as_json: Json = False,
) -> None:
    """Train the child of a plan on its parent's predictions.

    Data and training settings are the parent's, with a fifth of its learning rate; `--set` changes any field.
    """
    from explore.train import child_experiment

    experiment = child_experiment(
        plan, tokens, runs=runs, parent=parent, teacher=teacher, data=data, overrides=set_ or []
    )
    train_and_show(
        experiment,
        runs,
        path,
        as_json,
        checkpoint_every=checkpoint_every,
        wandb=wandb,
        devices=devices,
        strategy=strategy,
    )
