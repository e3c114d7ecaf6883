"""The `puzzle` command: choose a trained replacement for every layer of a run under budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from explore.cli.app import app, note, out
from explore.cli.opening import OR_KEY, run_argument
from explore.cli.options import (
    Context,
    DecodeBatch,
    DecodeHardware,
    Json,
    KVDtype,
    StateDtype,
    WeightDtype,
)
from explore.cli.rules import Apart, Needs
from explore.cost import HARDWARE

if TYPE_CHECKING:
    import pandas as pd

    from explore.compress.assembling import Children
    from explore.compress.library import LibraryRequest
    from explore.compress.puzzle import Choice, Limits, Puzzle

SHOWN = ("params_total", "params_active", "flops_train", "state_bytes")
MOST_BUDGETS = 100


@app.command(
    rich_help_panel="Compress trained models",
    epilog="Example: explore puzzle runs/my-run-0123abcd --max params_active=1M --max state_bytes=50%",
    rules=(
        Apart("--baselines", "--same --drop"),
        Apart("--sweep", "--solutions --baselines --rounds --out"),
        Needs("--figure", "--sweep"),
        Needs("--differ", "--solutions"),
        Needs("--round-tokens", "--rounds"),
    ),
)
def puzzle(
    run: Annotated[Path, run_argument(f"a finished {OR_KEY[2:]}")],
    most: Annotated[
        list[str] | None,
        typer.Option("--max", metavar="BUDGET=VALUE", help="At most this, e.g. params_active=1M or 50%; repeatable."),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(metavar="BUDGET=LOW:HIGH:N", help="Solve for N values of a budget and draw the results."),
    ] = None,
    same: Annotated[
        bool, typer.Option("--same", help="Give all remaining layers of a letter the same replacement.")
    ] = False,
    drop: Annotated[int | None, typer.Option(min=0, help="Leave out exactly this many layers.")] = None,
    solutions: Annotated[int, typer.Option(min=1, help="Save this many solutions, the best first.")] = 1,
    differ: Annotated[int, typer.Option(min=1, help="Minimum number of layers in which two solutions differ.")] = 1,
    baselines: Annotated[
        bool,
        typer.Option("--baselines", help="Compare with simpler methods under the same budgets; writes their plans."),
    ] = False,
    shares: Annotated[str, typer.Option(help="Sizes to offer, as shares of the parent's sizes.")] = "0.5,0.25",
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="SIZE", help="Offer only this size, e.g. E.n_experts; repeatable (default: all)."),
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, max=4, help="Maximum number of sizes of a block cut together.")] = 1,
    replacements: Annotated[
        str, typer.Option(help="What to offer: cut, pooled (means of heads), linear, none.")
    ] = "cut,pooled,linear,none",
    tokens: Annotated[
        int,
        typer.Option(min=1, metavar="COUNT", help="Training tokens for each replacement."),
    ] = 524_288,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate of replacements (default: a fifth of the parent's).")
    ] = None,
    val_tokens: Annotated[
        int,
        typer.Option(min=1, metavar="COUNT", help="Validation tokens on which to measure each replacement."),
    ] = 16_384,
    by: Annotated[str, typer.Option(help="What ranks indices, as in explore cut.")] = "activation",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the data order and of random choices.")] = 0,
    rounds: Annotated[
        int, typer.Option(min=1, help="Reach the budgets in this many rounds, with a distillation between rounds.")
    ] = 1,
    round_tokens: Annotated[
        int, typer.Option(min=1, metavar="COUNT", help="Tokens of each distillation between rounds.")
    ] = 524_288,
    context: Context = None,
    batch_size: DecodeBatch = 1,
    hardware: DecodeHardware = HARDWARE,
    weight_dtype: WeightDtype = "bfloat16",
    kv_dtype: KVDtype = "bfloat16",
    state_dtype: StateDtype = "float32",
    output: Annotated[
        Path | None, typer.Option("--out", help="Where to write the plan (default: in the run's folder).")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Where to draw the sweep, as PNG and SVG (default: in the run's folder).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose a replacement for every layer of a trained run under budgets, and write the plan of the child.

    Replacements of a layer are smaller sizes, a linear map and nothing. Each is trained to reproduce its layer's
    output and measured alone in the parent; then an integer program chooses one for every layer. The replacements are
    kept in the run's folder, so another budget takes only a moment. explore distil trains the child of the plan.
    """
    from explore.compress.assembling import Children
    from explore.compress.library import Library
    from explore.compress.measures import Setting
    from explore.compress.puzzle import Puzzle
    from explore.compress.scores import finished
    from explore.cost import Dtypes
    from explore.train import block_library, puzzle_rounds

    if not (most or sweep or drop):
        raise ValueError("--max: at least one of --max, --sweep and --drop is required, such as --max params_active=1M")
    request = _request(shares, vary, at_once, replacements, tokens, lr, val_tokens, by, seed)
    folder = finished(run)
    experiment = folder.load_experiment()
    request.offer.check(experiment.model)
    dtypes = Dtypes(weight_dtype, kv_dtype, state_dtype)
    setting = Setting(context or experiment.data.seq_len, batch_size, dtypes, hardware)
    sketch = Puzzle(
        Library.sketch(experiment.model, request.offer), setting
    )  # has the library's costs, without training
    limits = _limits(sketch, most or [], same, drop)
    budgets = [] if sweep is None else _budgets(sketch, sweep)
    for each in [limits, *(limits.with_budget(*budget) for budget in budgets)]:
        sketch.solve(each, solutions=solutions, differ=differ)
    folder, request = puzzle_rounds(folder, limits, request, setting, rounds, round_tokens)
    library = block_library(folder, request)
    solver, children = Puzzle(library, setting), Children(folder, library)
    if sweep is not None:
        _sweep_and_draw(solver, children, limits, budgets, figure, as_json=as_json)
        return
    found = solver.solve(limits, solutions=solutions, differ=differ)
    others = dict(solver.baselines(limits, seed)) if baselines else {}
    record = _record(solver, children, limits, found, others, output)
    if as_json:
        print(json.dumps(record, indent=2))
        return
    _print(record)


def _request(
    shares: str,
    vary: list[str] | None,
    at_once: int,
    replacements: str,
    tokens: int,
    lr: float | None,
    val_tokens: int,
    by: str,
    seed: int,
) -> LibraryRequest:
    from explore.compress.library import LibraryRequest

    offer = {
        "shares": _listed(shares),
        "vary": vary or (),
        "at_once": at_once,
        "replacements": _listed(replacements),
    }
    return LibraryRequest.model_validate(
        {"offer": offer, "tokens": tokens, "lr": lr, "val_tokens": val_tokens, "by": by, "seed": seed}
    )


def _listed(text: str) -> list[str]:
    return [each.strip() for each in text.split(",") if each.strip()]


def _limits(solver: Puzzle, most: list[str], same: bool, drop: int | None) -> Limits:
    from explore.compress.measures import read_budget
    from explore.compress.puzzle import Limits

    return Limits(dict(read_budget("--max", text, solver.parent_cost) for text in most), same, drop)


def _budgets(solver: Puzzle, text: str) -> list[tuple[str, float]]:
    """Reads `state_bytes=10k:50k:8` as geometrically spaced values, both ends included."""
    from explore.compress.measures import read_budget

    name, _, rest = text.partition("=")
    parts = rest.split(":")
    if not name or len(parts) != 3 or not parts[2].isdecimal() or not 2 <= int(parts[2]) <= MOST_BUDGETS:
        raise ValueError(
            f"--sweep must be of the form BUDGET=LOW:HIGH:N with N from 2 to {MOST_BUDGETS}, "
            f"such as state_bytes=20%:80%:7, got {text!r}"
        )
    low, high = (read_budget("--sweep", f"{name}={part}", solver.parent_cost)[1] for part in parts[:2])
    if not 0 < low < high:
        raise ValueError(f"--sweep {text}: LOW must be above 0 and below HIGH")
    n = int(parts[2])
    return [(name, low * (high / low) ** (i / (n - 1))) for i in range(n)]


def _record(
    solver: Puzzle,
    children: Children,
    limits: Limits,
    found: list[Choice],
    others: dict[str, Choice],
    output: Path | None,
) -> dict[str, Any]:
    """The record that `--json` prints; also writes the plans."""
    rows = [_row(solver, children, choice) for choice in found]
    compared = [{"method": name, **_row(solver, children, choice)} for name, choice in others.items()]
    flops = solver.library.flops + children.flops
    choices = zip((*rows, *compared), (*found, *others.values()), strict=True)
    for i, (row, choice) in enumerate(choices):
        plan = solver.plan(choice, limits, flops=flops)
        path = output if output and not i else children.folder.path / "plans" / f"{plan.key()[:8]}.json"
        plan.save(path)
        row["plan"] = str(path)
    model = solver.library.plan(found[0].options).model()
    names = [*limits.most, *(name for name in SHOWN if name not in limits.most)]
    measures = {name: (solver.parent_cost(name), solver.cost_of(model, name)) for name in names}
    return {
        **{name: rows[0][name] for name in ("plan", "predicted", "measured", "status", "gap", "layers")},
        "library": str(children.folder.path / f"library-{solver.library.key[:8]}.json"),
        "config": model.model_dump(mode="json"),
        "max": dict(limits.most),
        "cost": {name: pair[1] for name, pair in measures.items()},
        "parent_cost": {name: pair[0] for name, pair in measures.items()},
        "parent": children.parent._asdict(),
        "flops": flops,
        "notes": children.notes(found[0]),
        "solutions": rows,
        "baselines": compared,
    }


def _row(solver: Puzzle, children: Children, choice: Choice) -> dict[str, Any]:
    return {
        "predicted": choice.predicted,
        "measured": children.measure(choice)._asdict(),
        "cost": dict(choice.costs),
        "status": choice.status or None,
        "gap": choice.gap,
        "layers": solver.library.names(choice.options),
    }


def _print(record: dict[str, Any]) -> None:
    from explore.quantities import quantity

    layers = Table("layer", "replacement", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for layer in record["layers"]:
        layers.add_row(*layer.split(": ", 1))
    out.print(layers, highlight=False)
    table = Table("", "parent", "child", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name, value in record["cost"].items():
        text = quantity(name).text
        table.add_row(name, text(record["parent_cost"][name]), text(value))
    for name in ("val_loss", "val_bpb", "recall"):
        if (value := record["measured"][name]) is not None:
            table.add_row(f"{name}, not trained further", f"{record['parent'][name]:.4f}", f"{value:.4f}")
    out.print(table, highlight=False)
    rows = [("program", row) for row in record["solutions"]] + [(row["method"], row) for row in record["baselines"]]
    scores = Table("choice", "predicted", "KL", "val loss", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for i, (method, row) in enumerate(rows):
        name = f"{method} {i + 1}" if method == "program" and len(record["solutions"]) > 1 else method
        numbers = (row["predicted"], row["measured"]["kl"], row["measured"]["val_loss"])
        scores.add_row(name, *(f"{number:.4f}" for number in numbers))
    out.print(scores, highlight=False)
    out.print("predicted: sum of each replacement's KL when used alone, nats per token", style="dim", highlight=False)
    out.print(f"program: {record['status']}, gap {record['gap']:g}", style="dim", highlight=False, markup=False)
    for text in record["notes"]:
        note(text)
    out.print(f"{record['config']['pattern']}, plan: {record['plan']}", highlight=False, markup=False)


def _sweep_and_draw(
    solver: Puzzle,
    children: Children,
    limits: Limits,
    budgets: list[tuple[str, float]],
    figure: Path | None,
    *,
    as_json: bool,
) -> None:
    from explore.compress.assembling import sweep
    from explore.figures import plot_tradeoff, save_figure

    name = budgets[0][0]
    table = sweep(solver, children, limits, budgets)
    run = children.folder.path
    path = figure or run / f"puzzle-{name}-{solver.library.key[:8]}.png"
    drawing = plot_tradeoff(table, name, children.parent, solver.parent_cost(name), run.resolve().name)
    written = save_figure(drawing, path)
    if as_json:
        content = {
            "budget": name,
            "figure": str(written[0]),
            "parent_cost": solver.parent_cost(name),
            "parent": children.parent._asdict(),
            "points": table.to_dict("records"),
        }
        print(json.dumps(content, indent=2))
        return
    _print_sweep(table, name, solver.parent_cost(name), children.parent.val_loss)
    for each in written:
        out.print(f"wrote {each}", highlight=False)


def _print_sweep(table: pd.DataFrame, name: str, parent_cost: float, parent_loss: float) -> None:
    from explore.quantities import quantity

    text = quantity(name).text
    view = Table("budget", name, "predicted", "KL", "val loss", box=None, padding=(0, 2, 0, 0), header_style="dim")
    for row in table.to_dict("records"):
        numbers = (f"{row[column]:.4f}" for column in ("predicted", "kl", "val_loss"))
        view.add_row(text(row["budget"]), text(row[name]), *numbers)
    view.add_row("parent", text(parent_cost), "0", "0", f"{parent_loss:.4f}")
    out.print(view, highlight=False)
    out.print("predicted: sum of each replacement's KL when used alone, nats per token", style="dim", highlight=False)
