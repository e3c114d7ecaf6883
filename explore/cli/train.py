"""Train one experiment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from explore.cli.app import app, err, out
from explore.cli.opening import OR_KEY, run_argument
from explore.cli.options import CheckpointEvery, Json, Paths, SetOptions, Wandb, forced
from explore.quantities import columns, quantity

if TYPE_CHECKING:
    from explore.experiment import Experiment

Devices = Annotated[int, typer.Option(min=1, help="Processes that share every batch, each on its device.")]
Strategy = Annotated[
    Literal["auto", "ddp", "fsdp"],
    typer.Option(help="Of several devices: ddp copies the model, fsdp shards it; auto is ddp."),
]


@app.command(
    rich_help_panel="Train and search", epilog="Example: explore train experiment.json --set train.lr=1e-3 --runs runs"
)
def train(
    experiment: Annotated[Path, run_argument(f"an experiment in JSON, or {OR_KEY}", metavar="EXPERIMENT")],
    set_: SetOptions = None,
    runs: Annotated[Path, typer.Option(help="Folder of run folders.")] = Path("runs"),
    checkpoint_every: CheckpointEvery = None,
    keep_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between weights that are kept for `explore merge`; none if absent.")
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Compute activations again in the backward pass: less memory, slower.")
    ] = False,
    devices: Devices = 1,
    strategy: Strategy = "auto",
    path: Paths = None,
    wandb: Wandb = None,
    as_json: Json = False,
) -> None:
    """Train one experiment, or go on with it where it was stopped; a finished one is shown, not trained again."""
    from explore.experiment import Experiment

    train_and_show(
        Experiment.load(experiment / "experiment.json" if experiment.is_dir() else experiment, set_ or []),
        runs,
        path,
        as_json,
        checkpoint_every=checkpoint_every,
        keep_every=keep_every,
        recompute=recompute,
        wandb=wandb,
        devices=devices,
        strategy=strategy,
    )


def train_and_show(
    experiment: Experiment, runs: Path, paths: list[str] | None, as_json: bool, *, devices: int = 1, **options: Any
) -> None:
    """Trains an experiment and prints what came of it; the exit code is 1 unless that is a finished run."""
    from explore.ops import forced_paths
    from explore.train import fit, is_writer, slow_precision

    if (note := slow_precision(experiment)) is not None and is_writer(devices):
        err.print(note, style="yellow", highlight=False)
    with forced_paths(**forced(paths)):
        folder = fit(experiment, runs, devices=devices, **options)
    result = folder.result or {}
    if not is_writer(devices):
        return
    if as_json:
        print(json.dumps({"run": str(folder.path), **result}, indent=2))
    else:
        out.print(f"{folder.path}: {_outcome(result)}", highlight=False)
    if result.get("status") != "finished":
        raise typer.Exit(1)


def _outcome(result: dict[str, Any]) -> str:
    if result.get("status") != "finished":
        return f"{result.get('status', 'unfinished')}: {result.get('reason')}"
    scores = [each for each in columns() if each.is_quality and result.get(each.name) is not None]
    parts = [f"{each.name} {each.text(result[each.name])}" for each in scores]
    return f"finished: {', '.join(parts)}, {quantity('tokens_per_s').text(result.get('tokens_per_s'))} tokens/s"
