"""The `table` command: tabulate runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from explore.cli.app import app, out
from explore.cli.opening import Places
from explore.cli.options import Json, Where
from explore.cli.rules import Apart, Options
from explore.cli.tables import plain_table, print_fitting
from explore.quantities import EVAL_DATA, choose, headlines, quantity, unknown

if TYPE_CHECKING:
    import pandas as pd

FRONT = "front"
"""Column that marks the runs on the front."""

RUN_SETTINGS = ("tokens", "seed", "corpus", "d_model")
"""Settings shown besides the headline quantities; one that all rows share moves below the table."""


@app.command(
    rich_help_panel="Train and search",
    epilog='Example: explore table runs/ --out runs.csv; explore table runs/ --where "d_model>=64" --sort test_bpb; '
    "explore table sweeps/records/latent_or_not.parquet --columns name,seed,val_bpb --by-seed",
    rules=(Apart("--json", "--columns --by-seed"),),
)
def table(
    context: typer.Context,
    roots: Places,
    output: Annotated[Path | None, typer.Option("--out", help="Write the whole table as .csv or .parquet.")] = None,
    sort: Annotated[str, typer.Option(help="Column to sort by.")] = "val_bpb",
    columns: Annotated[
        list[str] | None, typer.Option(metavar="NAMES", help="Columns to show, separated by commas; repeatable.")
    ] = None,
    where: Where = None,
    by_seed: Annotated[bool, typer.Option("--by-seed", help="Show one row per run, not means over seeds.")] = False,
    unfinished: Annotated[bool, typer.Option(help="Include unfinished runs.")] = False,
    as_json: Json = False,
) -> None:
    """Tabulate runs, and mark the Pareto front of validation bits per byte against training FLOPs.

    Runs that differ only in their seed are one row: their mean ± the half-width of its 95% interval, with the variance
    pooled over runs of the same data and width. --out and --json have every run and every column.
    """
    from explore.frontier import pareto_front, seed_means
    from explore.table import load_table, save_table
    from explore.table import where as rows_where

    runs = rows_where(load_table(*roots, unfinished=unfinished), *(where or []))
    if sort not in runs:
        raise unknown(sort, list(runs.columns), "--sort", "a column")
    if "--sort" in Options(context).given and len(runs) and runs[sort].isna().all():
        with_values = [str(name) for name in runs.columns if runs[name].notna().any()]
        raise unknown(sort, with_values, "--sort", "a column with values")
    ascending = quantity(sort).better != "higher"
    runs = runs.sort_values(sort, ascending=ascending, ignore_index=True, kind="stable")
    asked = [
        choose(name.strip(), list(runs.columns), "--columns", "a column")
        for text in columns or []
        for name in text.split(",")
    ]
    if output is not None:
        save_table(runs, output)
    if as_json:
        print(runs.to_json(orient="records", indent=2))
        return
    view = seed_means(runs)
    is_grouped = not by_seed and len(view) < len(runs)
    view = view.sort_values(sort, ascending=ascending, ignore_index=True, kind="stable") if is_grouped else runs
    if {"flops_run", "val_bpb"} <= set(view.columns):
        view[FRONT] = pareto_front(view)
    shown = asked or _shown(view, is_grouped)
    rows: list[dict[str, Any]] = view.astype(object).where(view.notna(), None).to_dict("records")  # type: ignore[assignment]
    same = {} if asked else _same(rows, shown)
    fields = asked or [name for name in shown if name not in same and any(_cell(name, row) for row in rows)]
    print_fitting(out, partial(_table, rows), "", fields or shown)
    out.print(_caption(view, rows, same, is_grouped, len(runs)), style="italic", highlight=False)
    if output is not None:
        out.print(f"wrote {output}", highlight=False)


def _shown(view: pd.DataFrame, is_grouped: bool) -> list[str]:
    """The columns shown by default."""
    about = ["model", "pattern"]
    scores = [each.name for each in headlines(view.columns) if each.is_quality]
    others = [each.name for each in headlines(view.columns) if not each.is_quality]
    settings = ["n_seeds" if name == "seed" and is_grouped else name for name in RUN_SETTINGS if name not in others]
    return [name for name in (*about, *scores, *others, *settings) if name in view or name == "model"]


def _same(rows: list[dict[str, Any]], shown: Sequence[str]) -> dict[str, str]:
    """Settings that all rows share, as texts."""
    texts = {name: {_cell(name, row) for row in rows} for name in RUN_SETTINGS if name in shown}
    return {name: found.pop() for name, found in texts.items() if len(rows) > 1 and len(found) == 1 and found != {""}}


def _cell(name: str, row: dict[str, Any]) -> str:
    """A value as the table shows it."""
    from explore.frontier.seeds import grouped
    from explore.table import cell, model_label

    if name == "model":
        return model_label(*(str(row.get(each) or "") for each in ("name", "family", "pattern")))
    if row.get("status") not in ("finished", None) and not quantity(name).is_known and quantity(name).is_number:
        return str(row["status"]) if name == "val_bpb" else ""
    return grouped(name, row) if quantity(name).is_quality else cell(quantity(name), row)


def _table(rows: list[dict[str, Any]], title: str, fields: Sequence[str]) -> Table:
    view = plain_table(title)
    marks = [name for name in (FRONT, "run") if any(row.get(name) for row in rows)]
    for name in marks:
        view.add_column("" if name == FRONT else "run", no_wrap=True)
    for name in fields:
        if name not in marks:
            each = quantity(name)
            view.add_column(
                each.header, justify="right" if each.is_number and name != "model" else "left", no_wrap=True
            )
    for row in rows:
        about = [("●" if row[name] else "") if name == FRONT else str(row[name] or "") for name in marks]
        view.add_row(*about, *(_cell(name, row) for name in fields if name not in marks))
    return view


def _caption(
    view: pd.DataFrame, rows: list[dict[str, Any]], same: dict[str, str], is_grouped: bool, n_runs: int
) -> str:
    lines = [] if rows else ["no rows"]
    if same:
        lines.append("all: " + ", ".join(f"{quantity(name).header} {text}" for name, text in same.items()))
    if is_grouped:
        lines.append(f"{len(view)} means of {n_runs} runs, named after the first; ± half-width of the 95% interval")
    if FRONT in view and view[FRONT].any():
        mixed = EVAL_DATA in view and view[EVAL_DATA].nunique(dropna=False) > 1
        lines.append(f"● on the front of val bpb against training FLOPs{' for its data' if mixed else ''}")
    if any(_cell("lr", row).endswith("?") for row in rows):
        lines.append("? learning rate not tuned")
    return "\n".join(lines)
