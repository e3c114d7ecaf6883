"""Tabulate runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from explore.cli.app import app, out
from explore.cli.options import Json
from explore.quantities import EVAL_DATA, headlines, quantity, unknown

WIDE = 100
"""Characters of a terminal that has room for all columns."""


@app.command(rich_help_panel="Train and search", epilog="Example: explore table runs/ --out runs.csv")
def table(
    roots: Annotated[list[Path], typer.Argument(help="Folders that hold runs.")],
    output: Annotated[Path | None, typer.Option("--out", help="Write the whole table, .csv or .parquet.")] = None,
    sort: Annotated[str, typer.Option(help="Column to sort by.")] = "val_bpb",
    unfinished: Annotated[bool, typer.Option(help="Runs that have not ended, too.")] = False,
    as_json: Json = False,
) -> None:
    """One row a run, the Pareto front marked."""
    from explore.frontier import pareto_front
    from explore.table import cell, load_runs, model_label, save_table

    runs = load_runs(*roots, unfinished=unfinished)
    if sort not in runs:
        raise unknown(sort, list(runs.columns), "--sort", "a column")
    runs = runs.sort_values(sort, ascending=quantity(sort).better != "higher", ignore_index=True)
    if output is not None:
        save_table(runs, output)
    if as_json:
        print(runs.to_json(orient="records", indent=2))
        return
    mixed = runs[EVAL_DATA].nunique(dropna=False) > 1
    caption = (
        f"● on the front of val bpb against training FLOPs{' on its data' if mixed else ''}; ? learning rate not tuned"
    )
    view = Table(box=None, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    for name in ("", "model", "pattern", *(("corpus",) if mixed else ())):
        view.add_column(name, no_wrap=name == "pattern")
    shown = [each for each in headlines(runs.columns) if out.width >= WIDE or each.name != "d_model"]
    for each in shown:
        view.add_column(each.header, justify="right", no_wrap=True)
    known = runs.astype(object).where(runs.notna(), None)
    for run, front in zip(known.to_dict("records"), pareto_front(runs), strict=True):
        name, family, pattern = (run[column] or "" for column in ("name", "family", "pattern"))
        finished = run["status"] == "finished"
        cells = {each.name: cell(each, run) if finished or each.is_known else "" for each in shown}
        if not finished:
            cells["val_bpb"] = str(run["status"])
        about = [model_label(name, family, pattern), pattern, *((str(run["corpus"] or ""),) if mixed else ())]
        view.add_row("●" if front else "", *about, *cells.values())
    view.columns = [column for column in view.columns if any(column.cells)]
    out.print(view)
    if output is not None:
        out.print(f"wrote {output}", highlight=False)
