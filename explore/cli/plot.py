"""Draw runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from explore.cli.app import app, out
from explore.quantities import QUANTITIES, Family, choose, columns

COSTS = ", ".join(each.name for each in columns() if each.role == "cost" and not each.name.startswith("params_active_"))
QUALITIES = ", ".join(
    template.name.replace("{}", "NAME")
    for each in QUANTITIES.values()
    if (template := each.template if isinstance(each, Family) else each).is_quality
)


@app.command(
    rich_help_panel="Train and search",
    epilog="Example: explore plot runs/ --out frontier.png --x flops_decode --y sotu_bpb",
)
def plot(
    roots: Annotated[list[Path], typer.Argument(help="Folders that hold runs.")],
    output: Annotated[
        Path | None,
        typer.Option("--out", help="Picture, written as PNG and SVG; frontier.png in the first folder when absent."),
    ] = None,
    x: Annotated[str, typer.Option(help=f"Cost: {COSTS}, or any other number in the table.")] = "flops_run",
    y: Annotated[str, typer.Option(help=f"Quality: {QUALITIES}, or any other number in the table.")] = "val_bpb",
    html: Annotated[
        Path | None,
        typer.Option(help="Interactive page in one file, which any browser opens; instead of a picture without --out."),
    ] = None,
    corpus: Annotated[str | None, typer.Option(help="Draw only the runs that were trained on this corpus.")] = None,
) -> None:
    """Draw the accuracy-per-FLOP frontier, or any quantity against any other, families by colour."""
    from explore.figures import frontier_table, plot_frontier, save_figure
    from explore.table import load_runs

    runs = load_runs(*roots)
    if corpus is not None:
        runs = runs[runs["corpus"] == choose(corpus, sorted(runs["corpus"].dropna().unique()), "--corpus", "a corpus")]
    known = [each for each in columns(runs.columns) if runs.empty or runs[each.name].notna().any()]
    numeric = [each.name for each in known if each.is_number]
    x, y = choose(x, numeric, "--x"), choose(y, numeric, "--y")
    if frontier_table(runs, x, y).empty:
        raise ValueError(f"--x, --y: a finished run must have both {x} and {y}, got none among {len(runs)} runs")
    if html is not None:
        from explore.workbench import save_frontier

        out.print(f"wrote {save_frontier(runs, html, x, y)}", highlight=False)
        if output is None:
            return
    folder = roots[0] if roots[0].is_dir() else roots[0].parent
    for path in save_figure(plot_frontier(runs, x, y), output or folder / "frontier.png"):
        out.print(f"wrote {path}", highlight=False)
