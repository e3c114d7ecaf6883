"""The `score` command: importance scores of a trained run's parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from explore.cli.app import app, out
from explore.cli.opening import OR_KEY, run_argument
from explore.cli.options import DataOf, Json

if TYPE_CHECKING:
    from explore.compress import Scores
    from explore.model import ModelConfig


@app.command(
    rich_help_panel="Compress trained models",
    epilog="Example: explore score runs/my-run-0123abcd --figure scores.png",
)
def score(
    run: Annotated[Path, run_argument(f"{OR_KEY}, or with --data a folder written by explore import")],
    tokens: Annotated[
        int, typer.Option(min=1, metavar="COUNT", help="Tokens of the training split to read, e.g. 128k.")
    ] = 131_072,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of reading.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences to read at once.")] = 8,
    data: DataOf = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the scores here, as PNG and SVG.")] = None,
    as_json: Json = False,
) -> None:
    """Score the importance of a trained run's parts, and keep the scores in its folder.

    Indices of an axis are scored by their activations, layers by the effect of removing them. The table shows the share
    of the total score held by the weaker half of an axis; 50% means that all indices matter equally.
    """
    from explore.compress import score as score_run
    from explore.compress import weak_halves
    from explore.compress.parent import open_parent

    scores, path = score_run(run, tokens=tokens, seed=seed, batch_size=batch_size, data=data)
    model = open_parent(run, data).experiment.model
    if figure is not None:
        from explore.figures import plot_scores, save_figure

        save_figure(plot_scores(scores, model, run.resolve().name), figure)
    if as_json:
        print(json.dumps({"scores": str(path), **scores.about}, indent=2))
        return
    out.print(_table(scores, model, weak_halves(scores, model)), highlight=False)
    out.print(f"scores: {path}", highlight=False, markup=False)


def _table(scores: Scores, model: ModelConfig, halves: dict[tuple[int, str], float]) -> Table:
    view = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for name in ("layer", "mse", "kl", "loss", "influence"):
        view.add_column(name, justify="right")
    view.add_column("share of the weaker half")
    effects = {name: scores.layers(name) for name in ("mse", "kl", "loss", "influence")}
    for i, letter in enumerate(model.pattern):
        shares = ", ".join(f"{axis} {share:.0%}" for (layer, axis), share in halves.items() if layer == i)
        view.add_row(f"{i} {letter}", *(f"{effects[name][i]:.3g}" for name in effects), shares)
    view.add_row("all", "", "", "", "", f"d_model {halves[-1, 'd_model']:.0%}")
    return view
