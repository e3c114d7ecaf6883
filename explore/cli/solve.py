"""The `solve` command: find sizes that meet budgets."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from explore.cli.app import app, out
from explore.cli.models import is_pattern, load_model, model_content
from explore.cli.options import DModel, Json, SeqLen, SetOptions, Target, VocabSize
from explore.cost import SEQ_LEN
from explore.foreign import echo
from explore.formatting import read_count
from explore.quantities import budgets, quantity


@app.command(
    rich_help_panel="Count",
    epilog='Example: explore solve "MEM*E" --set blocks.E.d_latent=64 --target params_active=5M --target '
    "params_total=30M --free d_expert=64:1024 --free n_experts=8:256",
)
def solve(
    target: Target = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            metavar="BUDGET=VALUE",
            help=f"{', '.join(budgets())}; FLOPs per token, bytes per sequence, e.g. 5e6 or 5M; repeatable.",
        ),
    ] = None,
    like: Annotated[str | None, typer.Option(help="A model whose active and total parameters are the targets.")] = None,
    free: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD[=LOW:HIGH[:STEP]]",
            help="Size to solve for: d_model, d_ff, d_expert, n_experts, top_k, d_latent or another, in one block "
            "(E.d_expert) or in all blocks that have it; repeatable.",
        ),
    ] = None,
    d_model: DModel = None,
    vocab_size: VocabSize = None,
    seq_len: SeqLen = SEQ_LEN,
    tolerance: Annotated[float, typer.Option(help="Allowed relative error of a target (0.01 = 1%).")] = 0.01,
    set_: SetOptions = None,
    as_json: Json = False,
) -> None:
    """Find sizes with which a model meets its budgets, and print the residual of every budget.

    Sizes are multiples of a step: 64 for d_model, 16 for other widths, 8 for n_experts. If the targets cannot be met,
    print the nearest solution and the bound that prevents a better one, and exit with code 1.
    """
    from explore.model import check_overrides
    from explore.solve import match
    from explore.solve import solve as solve_for

    if target is None:
        raise ValueError("TARGET: a pattern, preset or path is required")
    if bool(like) == bool(targets):
        raise ValueError("--target, --like: exactly one of them is required")
    content = model_content(target, d_model, vocab_size, set_ or [])
    if like is not None:
        reference = load_model(like, *((d_model, vocab_size) if is_pattern(like) else ()))
        solution = match(reference, content, free or [], seq_len=seq_len, tolerance=tolerance)
    else:
        wanted = dict(_target(text) for text in targets or [])
        solution = solve_for(content, wanted, free or [], seq_len=seq_len, tolerance=tolerance)
    check_overrides(solution.model, set_ or [])
    if as_json:
        record = {
            "feasible": solution.feasible,
            "why": solution.why,
            "values": dict(solution.values),
            "residuals": [line._asdict() for line in solution.residuals],
            "model": solution.model.model_dump(mode="json"),
        }
        print(json.dumps(record, indent=2))
    else:
        out.print("  ".join(f"{field}={value}" for field, value in solution.values.items()), highlight=False)
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("budget")
        for name in ("value", "target", "residual"):
            table.add_column(name, justify="right")
        table.add_column("")
        for line in solution.residuals:
            wanted_value = quantity(line.name).text(line.target)
            residual = "" if line.residual is None else f"{line.residual:+.2%}"
            verdict = "" if line.ok is None else "✓" if line.ok else "✗"
            remark = " not solved for" if line.target is not None and not line.solved else ""
            table.add_row(
                line.name,
                quantity(line.name).text(line.value),
                wanted_value,
                residual,
                Text.assemble(verdict, (remark, "dim")),
            )
        out.print(table)
        if solution.why:
            out.print(f"infeasible: {solution.why}", highlight=False)
    if not solution.feasible:
        raise typer.Exit(1)


def _target(text: str) -> tuple[str, float]:
    """Reads `params_total=30M`."""
    name, _, value = text.partition("=")
    try:
        return name, read_count(value)
    except ValueError:
        raise ValueError(
            f"--target must be of the form BUDGET=VALUE, such as params_total=30M, got {echo(text)}"
        ) from None
