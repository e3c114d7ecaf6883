"""The `plot` command: draw runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from explore.cli.app import app, out
from explore.cli.opening import Places
from explore.cli.options import Where
from explore.cli.rules import Apart
from explore.foreign import echo
from explore.quantities import QUANTITIES, Family, choose, columns

if TYPE_CHECKING:
    import pandas as pd

    from explore.figures import RunFigure

FEW = 8
"""Up to this many curves have a colour each; more are coloured by family."""

COSTS = ", ".join(each.name for each in columns() if each.role == "cost" and not each.name.startswith("params_active_"))
QUALITIES = ", ".join(
    template.name.replace("{}", "NAME")
    for each in QUANTITIES.values()
    if (template := each.template if isinstance(each, Family) else each).is_quality
)


@app.command(
    rich_help_panel="Train and search",
    epilog="Example: explore plot runs/ --out frontier.png --x flops_decode --y sotu_bpb; "
    "explore plot runs/ --curves --x tokens --where d_model=64",
    rules=(
        Apart("--count-parent", "--curves"),
        Apart("--by-seed", "--curves"),
        Apart("--by-seed", "--html", unless="--out"),
        Apart("--html", "--curves"),
    ),
)
def plot(
    roots: Places,
    output: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Figure to write, as PNG and SVG (default: frontier.png or curves.png in the first folder)."
        ),
    ] = None,
    x: Annotated[
        str | None,
        typer.Option(
            help=f"Cost: {COSTS}, or any other number in the table; with --curves step, tokens or flops_run "
            "(default: flops_run)."
        ),
    ] = None,
    y: Annotated[
        str | None,
        typer.Option(
            help=f"Quality: {QUALITIES}, or any other number in the table; with --curves a column of metrics.csv "
            "(default: val_bpb)."
        ),
    ] = None,
    curves: Annotated[bool, typer.Option("--curves", help="Draw learning curves.")] = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Write one self-contained interactive page; add --out to write a picture as well."),
    ] = None,
    by_seed: Annotated[
        bool, typer.Option("--by-seed", help="Draw a point for each run, not a mean over seeds.")
    ] = False,
    count_parent: Annotated[
        bool,
        typer.Option(
            "--count-parent",
            help="Add the FLOPs of a child's parent, teacher and compression search to its own: "
            "--x flops_with_parent in place of flops_run.",
        ),
    ] = False,
    where: Where = None,
    corpus: Annotated[str | None, typer.Option(help="Draw only runs trained on this corpus.")] = None,
) -> None:
    """Draw the accuracy-per-FLOP frontier, any quantity against any other, or learning curves.

    Each family has a colour and a marker. Runs that differ only in their seed are drawn as a mean with its 95%
    interval. Runs on the front are labelled by pattern, or by name or settings where patterns repeat. A dashed line
    joins a parent with each child that was cut, quantised or distilled from it.
    """
    from explore.figures import frontier_table, plot_frontier, save_figure
    from explore.table import load_table
    from explore.table import where as rows_where

    folder = roots[0] if roots[0].is_dir() else roots[0].parent
    runs = rows_where(load_table(*roots, unfinished=curves), *(where or []))
    if corpus is not None:
        known = sorted(runs["corpus"].dropna().unique()) if "corpus" in runs else []
        runs = runs[runs["corpus"] == choose(corpus, known, "--corpus", "a corpus")]
    if count_parent:
        if x not in (None, "flops_run"):
            raise ValueError(f"--count-parent: must not be combined with an --x other than flops_run, got {echo(x)}")
        x = "flops_with_parent"
    if curves:
        figure = _curves(roots, runs, x, y)
    else:
        numeric = _numeric(runs)
        x, y = choose(x or "flops_run", numeric, "--x"), choose(y or "val_bpb", numeric, "--y")
        if frontier_table(runs, x, y).empty:
            raise ValueError(f"--x, --y: a finished run must have both {x} and {y}, got none among {len(runs)} runs")
        if html is not None:
            from explore.workbench import save_frontier

            out.print(f"wrote {save_frontier(runs, html, x, y)}", highlight=False)
            if output is None:
                return
        figure = plot_frontier(runs, x, y, by_seed=by_seed)
    for path in save_figure(figure, output or folder / ("curves.png" if curves else "frontier.png")):
        out.print(f"wrote {path}", highlight=False)


def _numeric(table: pd.DataFrame) -> list[str]:
    """The numeric columns, declared or not, with a value in some row."""
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    return [
        name
        for name in map(str, table.columns)
        if is_numeric_dtype(table[name])
        and not is_bool_dtype(table[name])
        and (table.empty or table[name].notna().any())
    ]


def _curves(roots: list[Path], runs: pd.DataFrame, x: str | None, y: str | None) -> RunFigure:
    """Learning curves of the runs: one colour each if there are few, else by family."""
    from explore.figures import plot_curves
    from explore.table import load_metrics

    metrics = load_metrics(*roots)
    metrics = metrics[metrics["run"].isin(runs["run"])]
    if metrics.empty:
        raise ValueError(f"--curves: a run must have a metrics.csv with rows, got none among {len(runs)} runs")
    validated = "val_bpb" in metrics and (metrics.dropna(subset="val_bpb").groupby("run").size() > 1).any()
    numeric = _numeric(metrics)
    x, y = choose(x or "flops_run", numeric, "--x"), choose(y or ("val_bpb" if validated else "loss"), numeric, "--y")
    return plot_curves(metrics, x, y, by="run" if metrics["run"].nunique() <= FEW else "family")
