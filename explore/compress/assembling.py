"""Assembles children from a library and measures them before further training, for one or several budgets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from explore.checkpoints import load_model
from explore.compress.library import Library
from explore.compress.notes import notes
from explore.compress.puzzle import Choice, Limits, Puzzle
from explore.compress.replacing import HeldOut, Measured
from explore.data.progress import progress
from explore.runs import RunFolder


class Children:
    """Evaluates children of one parent on its validation split.

    Attributes:
        flops: FLOPs spent on measuring children so far.
        parent: quality of the parent on the same text.
    """

    def __init__(self, run: RunFolder | str | Path, library: Library) -> None:
        self.folder = run if isinstance(run, RunFolder) else RunFolder(Path(run))
        self.library = library
        self.model = load_model(self.folder)
        experiment, request = self.folder.load_experiment(), library.about["request"]
        self.seq_len = experiment.data.seq_len
        source = experiment.data.open(experiment.seed)
        n_batches = max(1, round(request["val_tokens"] / experiment.batch_tokens))
        batches = islice(source.eval_batches("val", experiment.train.batch_size), n_batches)
        bf16, is_recall = experiment.train.recipe.high == "bf16", experiment.data.kind == "recall"
        self.text = HeldOut(self.model, batches, is_recall=is_recall, bf16=bf16)
        self.parent = self.text.measure(self.model)
        self.flops = 2 * self.text.n_tokens * self.model.config.cost(self.seq_len).flops_fwd

    def measure(self, choice: Choice) -> Measured:
        """Measures a child before further training."""
        child = self.library.child(self.model, choice.options, self.folder.path)
        self.flops += self.text.n_tokens * child.config.cost(self.seq_len).flops_fwd
        return self.text.measure(child)

    def notes(self, choice: Choice) -> list[str]:
        """Returns what a child lost and bits per byte does not show."""
        return notes(self.library.plan(choice.options), is_recall=self.text.is_recall)


def sweep(puzzle: Puzzle, children: Children, limits: Limits, budgets: Sequence[tuple[str, float]]) -> pd.DataFrame:
    """Finds the best child for each of several budgets.

    Args:
        limits: further limits on all children.
        budgets: bounds, all on the same named measure.

    Returns:
        Columns `budget`; the measure, by name, with the child's cost; predicted, gap (of the integer program), kl,
        val_loss, val_bpb, recall, pattern, and `layers`, the names of the replacements.
    """
    rows: list[dict[str, Any]] = []
    with progress("children", len(budgets)) as report:
        for i, (name, most) in enumerate(budgets):
            (choice,) = puzzle.solve(limits.with_budget(name, most))
            row = {"budget": most, name: choice.costs[name], "predicted": choice.predicted, "gap": choice.gap}
            names, pattern = puzzle.library.names(choice.options), puzzle.library.plan(choice.options).model().pattern
            rows.append({**row, **children.measure(choice)._asdict(), "pattern": pattern, "layers": names})
            report(i + 1)
    return pd.DataFrame(rows)
