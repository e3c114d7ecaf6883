"""The `runs` command: list, find, show and remove runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from explore.cli.app import app, note, out
from explore.cli.options import Json
from explore.cli.rules import Apart, Needs
from explore.cli.tables import plain_table, print_fitting
from explore.quantities import columns, quantity

if TYPE_CHECKING:
    from explore.runs import RunFolder

LISTED = ("status", "pattern", "params_total", "tokens", "seed", "val_bpb")
"""Columns of the list of runs."""

SHOWN = (
    "key", "status", "reason", "family", "pattern", "params_total", "params_active", "flops_train", "flops_run",
    "parent", "teacher", "quantized_from", "finished_at", "device", "commit",
)  # fmt: skip
"""Quantities shown for one run, besides its settings and scores."""

RELATED = ("parent", "teacher", "quantized_from")
"""Columns that name a run whose weights this run may need."""

CURVE_WIDTH, CURVE_HEIGHT = 60, 8


@app.command(
    rich_help_panel="Train and search",
    epilog="Example: explore runs; explore runs 3f2a; explore runs d128 --runs runs/first_frontier; "
    "explore runs 3f2a --remove",
    rules=(Needs("--yes", "--remove"), Apart("--json", "--remove")),
)
def runs(
    text: Annotated[
        str | None,
        typer.Argument(metavar="TEXT", help="First characters of a key, or part of a folder's name."),
    ] = None,
    roots: Annotated[
        list[Path] | None,
        typer.Option("--runs", help="Folder of runs, or a table of records; repeatable (default: runs)."),
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Delete the run and its checkpoints, after confirmation.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without confirmation.")] = False,
    as_json: Json = False,
) -> None:
    """List runs, or show one: its settings, its results and its learning curve.

    If TEXT matches one run, show it; if it matches several, list them. A run that is still training, or whose weights
    another run here needs, cannot be removed.
    """
    from explore.runs import RUNS, find_runs

    if remove and text is None:
        raise ValueError("TEXT: --remove needs the run to delete, such as the first characters of its key")
    found = find_runs(*(roots or [Path(RUNS)]))
    chosen = _matching(text, found)
    if remove:
        _remove(chosen, found, str(text), confirm=not yes)
    elif text is not None and len(chosen) == 1:
        _show(chosen[0], as_json)
    else:
        _list(chosen, as_json)


def _matching(text: str | None, among: list[RunFolder]) -> list[RunFolder]:
    """The runs that match a text: by path or full name, else by key prefix, else by part of the name."""
    if text is None:
        return among
    from explore.runs import PREFIX

    here = [run for run in among if run.path.name == text or run.path.resolve() == Path(text).resolve()]
    by_key = [run for run in among if len(text) >= PREFIX and (run.key or "").startswith(text)]
    if found := here or by_key or [run for run in among if text in run.path.name]:
        return found
    raise ValueError(f"TEXT must be a part of the name or the first {PREFIX} or more characters of the key of one of "
                     f"{len(among)} runs, got {text!r}")  # fmt: skip


def _list(found: list[RunFolder], as_json: bool) -> None:
    rows = [run.row() for run in found]
    if as_json:
        listed = [{"path": str(run.path), **row} for run, row in zip(found, rows, strict=True)]
        print(json.dumps(listed, indent=2))
        return

    def table(title: str, fields: Any) -> Table:
        view = plain_table(title)
        view.add_column("run", no_wrap=True)
        for field in fields:
            each = quantity(field)
            view.add_column(each.header, justify="right" if each.is_number else "left", no_wrap=True)
        for run, row in zip(found, rows, strict=True):
            view.add_row(run.path.name, *(quantity(field).text(row[field]) for field in fields))
        return view

    print_fitting(out, table, "", LISTED)
    out.print(f"{len(found)} runs; `explore runs KEY` shows one", highlight=False)


def _show(run: RunFolder, as_json: bool) -> None:
    from explore.table import settings

    row = {name: value for name, value in run.row().items() if value is not None}
    experiment = settings(run.experiment.get("experiment") or {})
    if as_json:
        metrics = run.metrics.astype(object).where(run.metrics.notna(), None).to_dict("list")
        record = {"path": str(run.path), "settings": experiment, "row": row, "metrics": metrics}
        print(json.dumps(record, indent=2))
        return
    out.print(str(run.path), style="bold", highlight=False)
    scores = [each.name for each in columns(row) if each.is_quality and each.name in row]
    _pairs("", {quantity(name).label: quantity(name).text(row[name]) for name in (*SHOWN, *scores) if name in row})
    _pairs("settings", {name: json.dumps(value) for name, value in experiment.items() if value is not None})
    _curve(run)


def _pairs(title: str, texts: dict[str, str]) -> None:
    view = Table(title=title or None, title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
    view.add_column(no_wrap=True)
    view.add_column(overflow="fold")
    for name, text in texts.items():
        view.add_row(name, text)
    out.print(view, highlight=False)


def _curve(run: RunFolder) -> None:
    """Draws validation scores over training tokens, or the training loss if there are fewer than two validations."""
    from explore.terminal import bars

    metrics = run.metrics
    validated = "val_bpb" in metrics and metrics["val_bpb"].notna().sum() > 1
    name = "val_bpb" if validated else "loss"
    if name not in metrics or "tokens" not in metrics or (points := metrics[["tokens", name]].dropna()).empty:
        return
    n = min(CURVE_WIDTH, len(points))
    means = points[name].groupby([i * n // len(points) for i in range(len(points))]).mean().tolist()
    rows = bars(means, CURVE_HEIGHT)
    marks = {0: f"{max(means):.3f}", len(rows) - 1: f"{min(means):.3f}"}
    margin = max(map(len, marks.values()))
    out.print(quantity(name).axis_label, style="italic", highlight=False)
    for i, line in enumerate(rows):
        out.print(f"{marks.get(i, ''):>{margin}} {line}", highlight=False)
    tokens = quantity("tokens")
    first, last = (tokens.text(points["tokens"].iloc[i]) for i in (0, -1))
    out.print(f"{'':>{margin}} {first:<{max(n - len(last), len(first) + 1)}}{last} tokens", highlight=False)


def _remove(chosen: list[RunFolder], found: list[RunFolder], text: str, *, confirm: bool) -> None:
    from explore.runs import remove_run

    if len(chosen) > 1:
        names = ", ".join(run.path.name for run in chosen[:4]) + (", ..." if len(chosen) > 4 else "")
        raise ValueError(f"TEXT must match one run with --remove, got {text!r}, which matches {len(chosen)}: {names}")
    (run,) = chosen
    rows = {other.path: other.row() for other in found if other.path != run.path}
    needing = [path.name for path, row in rows.items() if run.path.name in (row[name] for name in RELATED)]
    if needing:
        raise ValueError(f"{run.path}: {', '.join(needing[:4])} may need its weights; remove them first")
    if confirm and not typer.confirm(f"delete {run.path} ({run.status}) with its checkpoints?"):
        note("nothing was deleted")
        raise typer.Exit(1)
    remove_run(run)
    out.print(f"deleted {run.path}", highlight=False)
