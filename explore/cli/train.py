"""The `train` command: train one experiment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from explore.cli.app import app, err, out
from explore.cli.opening import OR_KEY, run_argument
from explore.cli.options import CheckpointEvery, Json, Paths, SetOptions, SplitBatch, Wandb, forced
from explore.formatting import size
from explore.quantities import columns, quantity

if TYPE_CHECKING:
    from explore.experiment import Experiment
    from explore.train.parallel import StrategyName

PLANNED = (
    "pattern", "family", "d_model", "params_total", "params_active", "lr", "seed", "corpus", "seq_len", "n_steps",
    "flops_run",
)  # fmt: skip
"""Quantities that `--dry-run` shows."""

Devices = Annotated[int, typer.Option(min=1, help="Devices that split every batch, with one process each.")]
Strategy = Annotated[
    Literal["auto", "ddp", "fsdp"],
    typer.Option(help="With several devices: ddp copies the model, fsdp shards it; auto means ddp."),
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
        int | None, typer.Option(min=1, help="Steps between the weights kept for `explore merge` (default: keep none).")
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Recompute activations in the backward pass: less memory, slower.")
    ] = False,
    split_batch: SplitBatch = False,
    devices: Devices = 1,
    strategy: Strategy = "auto",
    path: Paths = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the run's cost and memory; train and write nothing.")
    ] = False,
    wandb: Wandb = None,
    as_json: Json = False,
) -> None:
    """Train one experiment, or resume it from its last checkpoint; a finished run is shown, not trained again."""
    from explore.experiment import Experiment

    loaded = Experiment.load(experiment / "experiment.json" if experiment.is_dir() else experiment, set_ or [])
    if dry_run:
        forced(path)
        _check_training(loaded, devices, strategy, split_batch=split_batch)
        _show_plan(loaded, runs, as_json, recompute=recompute, devices=devices, strategy=strategy)
        return
    train_and_show(
        loaded,
        runs,
        path,
        as_json,
        checkpoint_every=checkpoint_every,
        keep_every=keep_every,
        recompute=recompute,
        split_batch=split_batch,
        wandb=wandb,
        devices=devices,
        strategy=strategy,
    )


def _check_training(experiment: Experiment, devices: int, strategy: StrategyName, *, split_batch: bool) -> None:
    """Checks the options of a dry run as training would."""
    from torch.cuda import is_available

    from explore.train.halves import check_halves
    from explore.train.parallel import check_parallel

    check_parallel(experiment.train, devices, strategy)
    if split_batch:
        check_halves(experiment, devices, "cuda" if is_available() else "cpu")


def _show_plan(
    experiment: Experiment, runs: Path, as_json: bool, *, recompute: bool, devices: int, strategy: StrategyName
) -> None:
    """Prints the run's folder, cost and memory without training it."""
    from explore.runs import run_folder
    from explore.table import expected_row
    from explore.train.capacity import needs

    key = experiment.key()
    folder = run_folder(runs, experiment.name, key)
    needed = needs(experiment, recompute=recompute, copies=devices if strategy != "fsdp" else 1)
    row = expected_row(experiment)
    record: dict[str, Any] = {"run": str(folder.path), "key": key, "status": folder.status if folder.key else "new"}
    record |= {name: row[name] for name in PLANNED if name in row}
    record |= {"tokens": experiment.n_steps * experiment.batch_tokens, "needed_bytes": needed.total}
    if as_json:
        print(json.dumps(record, indent=2))
    else:
        view = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for name, value in record.items():
            label = {"needed_bytes": "memory, at least"}.get(name) or quantity(name).header
            view.add_row(label, size(value) if name == "needed_bytes" else quantity(name).text(value))
        out.print(view, highlight=False)


def train_and_show(
    experiment: Experiment, runs: Path, paths: list[str] | None, as_json: bool, *, devices: int = 1, **options: Any
) -> None:
    """Trains an experiment and prints the outcome; exits with code 1 unless the run finished."""
    from explore.ops import forced_paths
    from explore.runs import run_folder
    from explore.train import fit, is_writer, slow_precision

    if (note := slow_precision(experiment)) is not None and is_writer(devices):
        err.print(note, style="yellow", highlight=False)
    was_finished = run_folder(runs, experiment.name, experiment.key()).is_finished
    with forced_paths(**forced(paths)):
        folder = fit(experiment, runs, devices=devices, **options)
    result = folder.result or {}
    if not is_writer(devices):
        return
    if as_json:
        print(json.dumps({"run": str(folder.path), **result}, indent=2))
    else:
        out.print(f"{folder.path}: {'already ' if was_finished else ''}{_outcome(result)}", highlight=False)
    if result.get("status") != "finished":
        raise typer.Exit(1)


def _outcome(result: dict[str, Any]) -> str:
    if result.get("status") != "finished":
        return f"{result.get('status', 'unfinished')}: {result.get('reason')}"
    scores = [each for each in columns() if each.is_quality and result.get(each.name) is not None]
    parts = [f"{each.name} {each.text(result[each.name])}" for each in scores]
    return f"finished: {', '.join(parts)}, {quantity('tokens_per_s').text(result.get('tokens_per_s'))} tokens/s"
