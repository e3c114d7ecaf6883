"""The `prove` command: check the ledger against built models."""

from __future__ import annotations

import json
import random
import time
from typing import Annotated

import typer
from rich.progress import track
from rich.table import Table

from explore.cli.app import app, err, out
from explore.cli.options import Json

SPEED_LAYERS = 52


@app.command(rich_help_panel="Prove", epilog="Example: explore prove --cases 200")
def prove(
    cases: Annotated[int, typer.Option(min=1, help="Number of random models.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random models.")] = 0,
    patterns: Annotated[
        int, typer.Option(min=0, help="Random 52-layer patterns on which to time the ledger.")
    ] = 10_000,
    as_json: Json = False,
) -> None:
    """Build random models and check the ledger against them: parameters, FLOPs of every phase, and saved tensors.

    A model has up to ten layers of any kind of block, with random sizes and options. FLOPs of matrix products are
    counted from their shapes; other ops must be on a list of known names, or the check raises an error.
    """
    import torch

    from explore.proof import Case, check, random_case, tally

    torch.set_num_threads(1)  # the models are tiny
    found: list[Case] = []
    for number in track(range(cases), "counting", console=err, transient=True, disable=not err.is_terminal):
        found += check(*random_case(seed, number))
    result = tally(found)
    seconds = _time_ledger(patterns, seed) if patterns else None
    wrong = [case for case in found if case.expected != case.found]
    if as_json:
        phases = {phase: {"cases": n, "agree": agree} for phase, (n, agree) in result.items()}
        print(json.dumps({"phases": phases, "patterns": patterns, "ledger_s": seconds}, indent=2))
    else:
        table = Table(title="The ledger compared with built and run models", title_justify="left", box=None)
        for name in ("phase", "random models", "equal"):
            table.add_column(name, justify="left" if name == "phase" else "right")
        for phase, (n, agree) in result.items():
            table.add_row(phase, str(n), str(agree))
        out.print(table)
        for case in wrong[:5]:
            where = f"{case.phase} of {case.model.pattern}, {case.seq_len} tokens"
            out.print(f"{where}: {case.expected:,} in the ledger, {case.found:,} found", highlight=False)
        if seconds is not None:
            out.print(
                f"totals of {patterns:,} random patterns of {SPEED_LAYERS} layers: {seconds:.2f} s", highlight=False
            )
    if wrong:
        raise typer.Exit(1)


def _time_ledger(n_patterns: int, seed: int) -> float:
    """Seconds to make the configs of random patterns and sum their costs; no model is built."""
    from explore.blocks import STANDARD_LETTERS
    from explore.model import ModelConfig

    rng = random.Random(seed)
    blocks = {letter: config.default(4096) for letter, config in STANDARD_LETTERS.items()}
    drawn = ["".join(rng.choices("".join(blocks), k=SPEED_LAYERS)) for _ in range(n_patterns)]
    began = time.perf_counter()
    for pattern in drawn:
        ModelConfig(d_model=4096, vocab_size=131_072, pattern=pattern, blocks=blocks).cost(4096)
    return time.perf_counter() - began
