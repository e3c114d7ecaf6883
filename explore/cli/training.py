"""Commands that train, tabulate, draw and evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from explore.cli.app import Json, Paths, SetOptions, app, count, err, forced, number, out

WandbMode = Literal["offline", "online"]
Strategy = Literal["auto", "ddp", "fsdp"]
Wandb = Annotated[WandbMode | None, typer.Option(help="Mirror to Weights & Biases; off when absent.")]
CheckpointEvery = Annotated[
    int | None, typer.Option(min=1, help="Steps between checkpoints; a twentieth of a run when absent.")
]


@app.command(
    rich_help_panel="Train and search", epilog="Example: explore train experiment.json --set train.lr=1e-3 --runs runs"
)
def train(
    experiment: Annotated[Path, typer.Argument(help="An experiment in JSON, or the experiment.json of a run.")],
    set_: SetOptions = None,
    runs: Annotated[Path, typer.Option(help="Folder of run folders.")] = Path("runs"),
    checkpoint_every: CheckpointEvery = None,
    keep_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between weights that are kept for `explore merge`; none if absent.")
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Compute activations again in the backward pass: less memory, slower.")
    ] = False,
    devices: Annotated[int, typer.Option(min=1, help="Processes that share every batch, each on its device.")] = 1,
    strategy: Annotated[
        Strategy, typer.Option(help="Of several devices: ddp copies the model, fsdp shards it; auto is ddp.")
    ] = "auto",
    path: Paths = None,
    wandb: Wandb = None,
    as_json: Json = False,
) -> None:
    """Train one experiment, or go on with it where it was stopped; a finished one is shown, not trained again."""
    from explore.experiment import Experiment
    from explore.ops import forced_paths
    from explore.train import fit, is_writer, slow_precision

    loaded = Experiment.load(experiment, set_ or [])
    if (note := slow_precision(loaded)) is not None and is_writer(devices):
        err.print(note, style="yellow", highlight=False)
    with forced_paths(**forced(path)):
        folder = fit(
            loaded,
            runs,
            checkpoint_every=checkpoint_every,
            keep_every=keep_every,
            recompute=recompute,
            wandb=wandb,
            devices=devices,
            strategy=strategy,
        )
    result = folder.result or {}
    if not is_writer(devices):
        return
    if as_json:
        print(json.dumps({"run": str(folder.path), **result}, indent=2))
    else:
        out.print(f"{folder.path}: {_outcome(result)}", highlight=False)
    if result.get("status") != "finished":
        raise typer.Exit(1)


@app.command(rich_help_panel="Train and search", epilog="Example: explore table runs/ --out runs.csv")
def table(
    roots: Annotated[list[Path], typer.Argument(help="Folders that hold runs.")],
    output: Annotated[Path | None, typer.Option("--out", help="Write the whole table, .csv or .parquet.")] = None,
    sort: Annotated[str, typer.Option(help="Column to sort by.")] = "val_bpb",
    unfinished: Annotated[bool, typer.Option(help="Runs that have not ended, too.")] = False,
    as_json: Json = False,
) -> None:
    """One row a run, the Pareto front marked."""
    import pandas as pd

    from explore.frontier import pareto_front
    from explore.runs import COLUMNS, load_runs, model_label, save_table

    if sort not in COLUMNS:
        raise ValueError(f"--sort: {sort!r} is not a column; allowed are {', '.join(COLUMNS)}")
    runs = load_runs(*roots, unfinished=unfinished).sort_values(sort, ignore_index=True)
    if output is not None:
        save_table(runs, output)
    if as_json:
        print(runs.to_json(orient="records", indent=2))
        return
    caption = "● on the front of val bpb against training FLOPs; ? learning rate not tuned"
    view = Table(box=None, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    for name in ("", "model", "pattern"):
        view.add_column(name, no_wrap=name == "pattern")
    for name in ("d_model", "params", "active", "FLOPs", "lr", "off", "val bpb", "test bpb"):
        view.add_column(name, justify="right", no_wrap=True)
    for (_, run), front in zip(runs.iterrows(), pareto_front(runs), strict=True):
        numbers = [count(run[name]) for name in ("params_total", "params_active", "flops_run")]
        bits = [number(run[name], ".3f") for name in ("val_bpb", "test_bpb")]
        if run["status"] != "finished":
            bits = [str(run["status"]), ""]
        told = ["" if pd.isna(run[name]) else str(run[name]) for name in ("name", "family", "pattern")]
        names = [model_label(*told), told[2], str(run["d_model"])]
        tuned = number(run["lr"], ".2g") + ("" if run["tuned"] is True else "?")
        view.add_row("●" if front else "", *names, *numbers, tuned, number(run["residual"], ".2%"), *bits)
    view.columns = [column for column in view.columns if any(column.cells)]
    out.print(view)
    if output is not None:
        out.print(f"wrote {output}", highlight=False)


@app.command(
    rich_help_panel="Train and search",
    epilog="Example: explore plot runs/ --out frontier.png --x flops_run --y val_bpb",
)
def plot(
    roots: Annotated[list[Path], typer.Argument(help="Folders that hold runs.")],
    output: Annotated[
        Path | None,
        typer.Option("--out", help="Picture, written as PNG and SVG; frontier.png in the first folder when absent."),
    ] = None,
    x: Annotated[str, typer.Option(help="Column of the cost, on a logarithmic axis.")] = "flops_run",
    y: Annotated[str, typer.Option(help="Column of the error.")] = "val_bpb",
) -> None:
    """Draw the accuracy-per-FLOP frontier, families by colour."""
    from explore.figures import plot_frontier, save_figure
    from explore.runs import COLUMNS, load_runs

    numeric = [name for name, dtype in COLUMNS.items() if dtype in ("float64", "Int64")]
    for option, column in (("--x", x), ("--y", y)):
        if column not in numeric:
            raise ValueError(
                f"{option}: {column!r} is not a number in the table of runs; allowed are {', '.join(numeric)}"
            )
    runs = load_runs(*roots)
    for path in save_figure(plot_frontier(runs, x, y), output or roots[0] / "frontier.png"):
        out.print(f"wrote {path}", highlight=False)


def _outcome(result: dict[str, Any]) -> str:
    if result.get("status") != "finished":
        return f"{result.get('status', 'unfinished')}: {result.get('reason')}"
    parts = [
        f"{name} {result[name]:.4f}"
        for name in ("val_bpb", "test_bpb", "val_loss", "recall")
        if result.get(name) is not None
    ]
    return f"finished: {', '.join(parts)}, {number(result.get('tokens_per_s'), ',.0f')} tokens/s"
