"""The `merge` command: average checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from explore.cli.app import app, out
from explore.cli.opening import OR_KEY, run_argument
from explore.cli.options import Json
from explore.quantities import columns


@app.command(
    rich_help_panel="Use trained models",
    epilog="Example: explore merge runs/my-run-0123abcd --last 5 --shape minus_sqrt",
)
def merge(
    run: Annotated[Path, run_argument(f"{OR_KEY}, trained with --keep-every")],
    last: Annotated[
        int, typer.Option(min=1, help="Number of checkpoints to merge, the last ones of the stable phase.")
    ] = 5,
    shape: Annotated[
        Literal["flat", "minus_sqrt"],
        typer.Option(help="Decay that the average imitates; flat imitates a linear decay."),
    ] = "minus_sqrt",
    save: Annotated[bool, typer.Option("--save", help="Keep the merged weights as checkpoints/merged.ckpt.")] = False,
    as_json: Json = False,
) -> None:
    """Average checkpoints of the stable phase, which imitates a learning-rate decay, and score the average."""
    from explore.runs import RunFolder
    from explore.train import score_merge

    folder = RunFolder(run)
    merged = score_merge(folder, last, shape, save=save)
    if as_json:
        print(json.dumps(merged, indent=2))
        return
    rows = {f"step {merged['steps'][-1]}": merged["last"], f"{last} merged, {shape}": merged}
    if (result := folder.result or {}).get("status") == "finished":
        rows[f"step {result.get('step')}, the run's own"] = result
    shown = [each for each in columns() if each.role == "loss" and merged[each.name] is not None]
    view = Table("", *(each.header for each in shown), box=None, padding=(0, 1, 0, 0))
    for name, scores in rows.items():
        view.add_row(name, *(each.text(scores.get(each.name)) for each in shown))
    out.print(view, highlight=False)
    written = "merged.json and checkpoints/merged.ckpt" if save else "merged.json"
    out.print(f"wrote {written} in {run}", highlight=False)
