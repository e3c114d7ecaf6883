"""Validation loss of children before any training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from explore.compress.candidates import DEPTH, Candidate
from explore.compress.cutting import Cutter
from explore.compress.parent import open_parent
from explore.compress.plan import Plan
from explore.data.progress import progress
from explore.evals import bits_per_byte
from explore.experiment import Experiment
from explore.model import LanguageModel
from explore.runs import RunFolder


class ZeroShot(NamedTuple):
    """Quality of a model on the validation split, before it is trained further.

    Attributes:
        val_loss: validation loss, in nats per token.
        val_bpb: bits per byte; None if the data is not text.
        tokens: number of predicted tokens.
    """

    val_loss: float
    val_bpb: float | None
    tokens: int


class Ranked(NamedTuple):
    """A candidate with its plan and its quality."""

    candidate: Candidate
    plan: Plan
    quality: ZeroShot


class Validation:
    """The validation split of a run.

    Args:
        tokens: number of predicted tokens; None uses the run's own evaluation length.
        data: run or experiment whose data an imported checkpoint is scored on.
    """

    def __init__(self, run: RunFolder | str | Path, tokens: int | None = None, data: str | Path | None = None) -> None:
        self.experiment: Experiment = open_parent(run, data).experiment
        self.source = self.experiment.data.open(self.experiment.seed)
        self.tokens = self.experiment.train.eval_tokens if tokens is None else tokens

    def zero_shot(self, model: LanguageModel) -> ZeroShot:
        """Measures a model."""
        batches = self.source.eval_batches("val", self.experiment.train.batch_size, self.tokens)
        score = bits_per_byte(model, batches)
        return ZeroShot(score.loss, score.bits_per_byte, score.n_targets)

    def rank(self, cutter: Cutter, among: Iterable[Candidate], *, drop_mtp: bool = False) -> list[Ranked]:
        """Returns candidates with their plans, lowest loss first; each plan includes the FLOPs of scoring all."""
        chosen, ranked, spent = list(among), [], 0.0
        with progress("candidates", len(chosen)) as report:
            for i, each in enumerate(chosen):
                widths = {name: n for name, n in each.sizes.items() if name != DEPTH}
                plan = cutter.plan(widths, each.n_dropped, drop_mtp=drop_mtp)
                quality = self.zero_shot(cutter.child(plan))
                spent += quality.tokens * plan.model().cost(self.experiment.data.seq_len).flops_fwd
                ranked.append(Ranked(each, plan, quality))
                report(i + 1)
        ranked = [
            each._replace(
                plan=each.plan.model_copy(update={"origin": {**each.plan.origin, "flops": each.plan.flops + spent}})
            )
            for each in ranked
        ]
        return sorted(ranked, key=lambda each: each.quality.val_loss)


def spread(found: Sequence[Candidate], n: int) -> list[Candidate]:
    """Selects at most `n` candidates, evenly spaced."""
    if len(found) <= n:
        return list(found)
    return [found[i * (len(found) - 1) // max(1, n - 1)] for i in range(n)]
