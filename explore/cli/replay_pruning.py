"""The `replay-pruning` command: measure pruning on recorded learning curves."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track
from rich.table import Table

from explore.cli.app import app, err, out
from explore.cli.options import Json


@app.command(
    rich_help_panel="Prove",
    epilog="Example: explore replay-pruning sweeps/records/pattern_grid.csv --margin 0.02 --seeds 200",
)
def replay_pruning(
    table: Annotated[Path, typer.Argument(help="A .csv or .parquet of runs: flops_run, val_bpb, val_bpb_at_20, ...")],
    margin: Annotated[
        list[float] | None,
        typer.Option(min=0, help="Margin behind the front, bits per byte; repeatable (default: several)."),
    ] = None,
    min_trials: Annotated[
        list[int] | None, typer.Option(min=0, help="Finished trials required before any is stopped; repeatable.")
    ] = None,
    min_fraction: Annotated[
        list[float] | None,
        typer.Option(
            min=0, max=1, help="Share of the schedule that a run completes before it can be stopped; repeatable."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of random orders of arrival.")] = 200,
    as_json: Json = False,
) -> None:
    """Replay finished runs in random orders, and measure the FLOPs that pruning saves and the front it loses."""
    import pandas as pd

    from explore.study import FrontPruner
    from explore.study.prune_replay import BUDGETS, mean_outcomes, pruning_outcomes
    from explore.table import read_table

    runs = read_table(table)
    default = FrontPruner()
    pruners = [
        FrontPruner(margin=each, min_trials=n, min_fraction=fraction)
        for fraction, n, each in product(
            min_fraction or [default.min_fraction], min_trials or [default.min_trials], margin or [0, 0.01, 0.02, 0.05]
        )
    ]
    found = pruning_outcomes(runs, pruners, range(seeds))
    n_searches = len(pruners) * seeds
    rows = pd.DataFrame(track(found, "replaying", n_searches, console=err, transient=True, disable=not err.is_terminal))
    summary = mean_outcomes(rows)
    if as_json:
        print(summary.to_json(orient="records", indent=2))
        return
    view = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    view.title = f"{len(runs)} runs in {seeds} orders, relative to no pruning: mean [central 95% of the orders]"
    names = {"spent": "FLOPs spent", "killed": "share of the front killed"}
    names |= {f"volume_at_{100 * share:.0f}": f"volume at {share:.0%} of FLOPs" for share in BUDGETS}
    names |= {"volume_at_100": "at the end"}
    for name in ("margin", "trials", "from", *names.values()):
        view.add_column(name, justify="right")
    for row in summary.to_dict("records"):
        cells = (f"{row[c]:.3f} [{row[f'{c}_low']:.3f}, {row[f'{c}_high']:.3f}]" for c in names)
        view.add_row(f"{row['margin']:g}", f"{row['min_trials']}", f"{row['min_fraction']:.0%}", *cells)
    out.print(view, highlight=False)
