"""Tabulate runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from explore.cli.app import app, count, number, out
from explore.cli.options import Json


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
