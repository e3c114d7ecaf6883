"""The `sweep` command: search with Optuna, or preview a search."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from explore.cli.app import app, err, note, out
from explore.cli.options import CheckpointEvery, Json, Wandb
from explore.cli.rules import Needs
from explore.formatting import count, duration, flops
from explore.quantities import quantity

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from explore.experiment import Experiment
    from explore.study import Preview, Sweep

Storage = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Optuna storage, such as postgresql+psycopg:// or grpc:// (default: a journal)."),
]

EXAMPLE = ("family", "pattern", "d_model", "params_total", "params_active", "flops_run")
"""Columns of the examples in a preview."""

DESIGN = ("name", "pattern", "tokens", "n_steps", "params_active", "params_total", "flops_run")
"""Columns of the experiments of a study with a gate."""


@app.command(
    rich_help_panel="Train and search",
    epilog="Example: explore sweep sweeps/first_frontier.py --trials 40 --workers 2, after a look with --dry-run",
    rules=(Needs("--cluster-option", "--cluster"),),
)
def sweep(
    file: Annotated[Path, typer.Argument(help="A sweep file: docstring, experiment(trial), objectives.")],
    trials: Annotated[
        int, typer.Option(min=1, help="Total number of trials in the study, including existing ones.")
    ] = 20,
    runs: Annotated[Path | None, typer.Option(help="Folder of runs and journal (default: runs/NAME).")] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Worker processes (default: one per core if models are small, else 1)."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the space, its cost and the expected time; train and write nothing.")
    ] = False,
    sampler: Annotated[
        str | None, typer.Option(help="random, qmc, grid, tpe, nsga2, nsga3 or gp (default: the sweep file's).")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the sampler (default: the study's, or 0).")] = None,
    storage: Storage = None,
    new_study: Annotated[
        bool, typer.Option("--new-study", help="Start a new study even if this file has one.")
    ] = False,
    prune: Annotated[bool, typer.Option(help="Let the sweep file's pruner stop runs.")] = True,
    ungated: Annotated[bool, typer.Option("--ungated", help="Continue even if the sweep file's gate fails.")] = False,
    notes: Annotated[bool, typer.Option(help="Write notes, figures and the current frontier.")] = True,
    cluster: Annotated[
        Literal["slurm", "local"] | None, typer.Option(help="Submit the workers with submitit and wait for them.")
    ] = None,
    cluster_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Option of submitit's executor, e.g. slurm_partition=gpu; repeatable."),
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(help="Records (.parquet) to start from and add all runs to, hourly; small enough to commit."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Set a parameter that the sweep file declares, e.g. tokens=2M; repeatable.",
        ),
    ] = None,
    checkpoint_every: CheckpointEvery = None,
    wandb: Wandb = None,
    as_json: Json = False,
) -> None:
    """Search with Optuna, or resume a search; finished experiments are never trained again.

    A sweep file may declare parameters = {"tokens": 2_000_000}, which --set changes; different values make a different
    study. Run the same command in any number of terminals or hosts with one storage to work on one study.
    """
    from explore.study import TrialOptions, check_request, choose_workers, load_sweep, preview, run_gated
    from explore.study.parameters import read_parameters

    loaded = load_sweep(file, read_parameters(file, set_ or []))
    folder = runs or Path("runs") / loaded.name
    if workers is None:
        workers = 1 if cluster else choose_workers(loaded.examples, trials)
        if workers > 1 and not as_json:
            note(
                f"using {workers} workers of one thread each, faster for models this small (--workers 1 for one worker)"
            )
    if ungated and loaded.gate is None:
        raise ValueError(f"--ungated: must come with a sweep file that has a gate, got {file}")
    asked: dict[str, Any] = {
        "sampler": sampler, "seed": seed, "storage": storage, "new_study": new_study, "cluster": cluster,
        "cluster_options": _options(cluster_option), "records": records,
    }  # fmt: skip
    if dry_run:
        check_request(loaded, folder, **asked)
        if loaded.gate is not None:
            trials = min(trials, len(loaded.design))
        with err.status("probing the space and timing a few experiments"):
            previewed = preview(loaded, trials, folder, workers=workers, seed=seed or 0)
        _show(loaded, previewed, trials, workers, as_json)
        return
    summary, report = run_gated(
        loaded,
        trials,
        folder,
        ungated=ungated,
        **asked,
        workers=workers,
        options=TrialOptions(checkpoint_every=checkpoint_every, wandb=wandb, prune=prune, notes=notes),
        console=err,
    )
    numbers = dataclasses.asdict(summary)
    if as_json:
        gate = {} if report is None else {"gate": report.table().to_dict("records"), "gate_passed": report.passed}
        print(json.dumps({"runs": str(folder), **numbers, **gate}))
    else:
        if report is not None:
            out.print(gate_table(f"gate of {loaded.name}, at {report.size}", report.table()))
        del numbers["study"]
        out.print(f"{folder}: " + ", ".join(f"{n} {name}" for name, n in numbers.items()), highlight=False)
    if report is not None and not report.passed:
        end = "continued because of --ungated" if ungated else "stopped (--ungated continues anyway)"
        err.print(f"{loaded.name}: the gate fails {report.reason}; {end}", highlight=False, soft_wrap=True)
        if not ungated:
            raise typer.Exit(1)
    if summary.failed and not (summary.complete or summary.pruned):
        raise typer.Exit(1)


def _options(texts: list[str] | None) -> dict[str, Any]:
    """Reads `--cluster-option`: numbers as numbers, everything else as text."""
    options: dict[str, Any] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--cluster-option must be of the form NAME=VALUE, such as timeout_min=600, got {text!r}")
        options[name] = int(value) if value.lstrip("-").isdigit() else value
    return options


def _show(sweep: Sweep, preview: Preview, trials: int, workers: int, as_json: bool) -> None:
    """Prints the preview of a sweep; of one with a gate, also its whole question, its design and its gate."""
    from explore.train import slow_precision

    if as_json:
        record = dataclasses.asdict(preview)
        record["examples"] = [_example(each) for each in preview.examples]
        if sweep.gate is not None:
            record["design"] = [_example(each, DESIGN) for each in sweep.design]
            record["gate"] = sweep.gate.needs(sweep.seeds).to_dict("records")
        if preview.noise is not None and math.isnan(preview.noise.bartlett_p):
            record["noise"]["bartlett_p"] = None
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        print(json.dumps(finite, indent=2))
        return
    question = sweep.question if sweep.gate is not None else sweep.question.splitlines()[0]
    out.print(question, highlight=False, markup=False)
    if preview.continuous:
        size = f"infinite: {', '.join(preview.continuous)} {'is' if len(preview.continuous) == 1 else 'are'} continuous"
    elif preview.n_feasible_error > 0.005 * preview.n_feasible:
        size = f"about {count(preview.n_feasible)}, ± {count(preview.n_feasible_error)}"
    else:
        size = f"{preview.n_feasible:,.0f}"
    lines = {"feasible experiments": size}
    if preview.rejected:
        lines["rejected before training"] = f"{preview.rejected:.0%} of draws, e.g. {preview.why[0][0]}"
    runs = f"{trials} trials" + (f" of {sweep.seeds} seeds" if sweep.seeds > 1 else "")
    lines["training FLOPs"] = f"{flops(preview.flops)} for {runs}"
    if preview.pilot_flops:
        lines["learning-rate pilots"] = f"{flops(preview.pilot_flops)} FLOPs"
    if preview.wall_s is not None:
        crew = f"{workers} worker{'s' if workers > 1 else ''}"
        lines["expected time here"] = (
            f"{duration(preview.wall_s)} with {crew}, from {len(preview.examples)} timed examples"
        )
    slow = next((note for note in map(slow_precision, preview.examples) if note is not None), None)
    if slow is not None:
        lines["slow here"] = slow
    if preview.noise is None or preview.differences is None:
        lines["resolvable difference"] = "unknown: no experiment here has run with two seeds yet"
    else:
        lines["resolvable difference"] = (
            f"{preview.differences[0]:.4f} bits per byte between the cheapest trials, {preview.differences[1]:.4f} "
            f"between the most expensive, with {sweep.seeds} seed(s), at level 5% and power 80%; standard deviation "
            f"over seeds {preview.noise.sd[0]:.4f} and {preview.noise.sd[1]:.4f} ({preview.noise.kind}), from "
            f"{preview.noise.n} repeated experiments"
            + ("" if math.isnan(preview.noise.bartlett_p) else f"; Bartlett test: p = {preview.noise.bartlett_p:.2g}")
        )
    view = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, text in lines.items():
        view.add_row(name, text)
    out.print(view, highlight=False)
    if sweep.gate is None:
        out.print(_experiments("examples, cheapest first", preview.examples, EXAMPLE), highlight=False)
        return
    title = f"design: {len(sweep.design)} trials of {sweep.seeds} seeds, those of the gate first"
    out.print(_experiments(title, sweep.design, DESIGN), highlight=False)
    out.print(gate_table(f"gate of {sweep.name}", sweep.gate.needs(sweep.seeds)))


def _experiments(title: str, experiments: Sequence[Experiment], columns: Sequence[str]) -> Table:
    view = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
    for name in columns:
        view.add_column(quantity(name).header, justify="right" if quantity(name).is_number else "left")
    for each in experiments:
        view.add_row(*(quantity(name).text(value) for name, value in _example(each, columns).items()))
    return view


def gate_table(title: str, conditions: pd.DataFrame) -> Table:
    """A table of a gate's conditions; verdicts that fail are red."""
    from explore.frontier.gate import FAILED

    view = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in conditions:
        view.add_column(str(column), overflow="fold")
    for row in conditions.itertuples(index=False):
        view.add_row(*(Text(cell, "red" if cell == FAILED else "") for cell in row))
    return view


def _example(experiment: Experiment, columns: Sequence[str] = EXAMPLE) -> dict[str, Any]:
    from explore.table import expected_row

    n_steps = experiment.n_steps
    row = expected_row(experiment) | {"n_steps": n_steps, "tokens": n_steps * experiment.batch_tokens}
    return {name: row[name] for name in columns}
