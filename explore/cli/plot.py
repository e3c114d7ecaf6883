"""Draw runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from explore.cli.app import app, out


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
