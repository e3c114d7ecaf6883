"""The `replay-samplers` command: compare samplers on a table of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track
from rich.table import Table

from explore.cli.app import app, err, out
from explore.cli.options import Json


@app.command(
    rich_help_panel="Prove",
    epilog="Example: explore replay-samplers sweeps/records/pattern_grid.csv --trials 20 --trials 40 --seeds 30",
)
def replay_samplers(
    table: Annotated[Path, typer.Argument(help="A .csv or .parquet with every point of a grid: pattern, d_model, ...")],
    trials: Annotated[
        list[int] | None, typer.Option(min=1, help="Experiments per search; repeatable (default: 40).")
    ] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Number of searches by each sampler.")] = 30,
    sampler: Annotated[list[str] | None, typer.Option(help="Only this sampler; repeatable.")] = None,
    axis: Annotated[
        list[str] | None, typer.Option(help="Column of the grid besides the pattern; repeatable (default: d_model).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Let every sampler search a fully trained grid, and compare the front it finds with the whole front.

    Regret is the share of the grid's hypervolume not found, with FLOPs on a log axis. Nothing is trained. As in a
    sweep, a repeated experiment costs nothing, and the sampler draws again.
    """
    import pandas as pd

    from explore.search.replay import SIMPLEST_FIRST, judge, mean_regrets, sampler_regrets
    from explore.table import read_table

    runs = read_table(table)
    n_trials, samplers = sorted(set(trials or [40])), sampler or list(SIMPLEST_FIRST)
    found = sampler_regrets(runs, samplers, n_trials, range(seeds), axis or ["d_model"])
    total = len(n_trials) * len(samplers) * seeds
    shown = track(found, "searching", total, console=err, transient=True, disable=not err.is_terminal)
    results = pd.DataFrame(shown)
    summary = mean_regrets(results)
    verdicts = {n: judge(results, n) for n in n_trials}
    if as_json:
        records = json.loads(summary.to_json(orient="records"))
        print(json.dumps({"summary": records, "verdicts": {n: v._asdict() for n, v in verdicts.items()}}, indent=2))
        return
    view = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    view.title = f"{len(runs)} experiments, {seeds} seeds; means and 95% intervals over seeds"
    for name in ("trials", "sampler", "regret", "difference from random", "repeats"):
        view.add_column(name, justify="left" if name == "sampler" else "right", no_wrap=True)
    for row in summary.to_dict("records"):
        paired = "difference" in row and row["sampler"] != "random"
        gap = (
            f"{row['difference']:+.3f} [{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]" if paired else ""
        )
        interval = f"{row['regret']:.3f} [{row['regret_low']:.3f}, {row['regret_high']:.3f}]"
        view.add_row(str(row["trials"]), str(row["sampler"]), interval, gap, f"{row['repeats']:.1f}")
    out.print(view)
    for n, verdict in verdicts.items():
        resolved = (
            "" if verdict.default == verdict.least else f", not resolved from {verdict.default}, which is simpler"
        )
        out.print(f"{n} trials: {verdict.least} has the lowest regret{resolved}; default: {verdict.default}")
