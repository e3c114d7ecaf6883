"""Recall accuracy on synthetic data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from explore.data import IGNORED, Batch
from explore.model import LanguageModel


@dataclass(frozen=True)
class RecallScore:
    """Counts of targets that are the model's first choice, by number of pairs in their sequence.

    Attributes:
        n_correct: correct targets by number of pairs; key 0 is for sequences whose number is unknown.
        n_targets: all targets by number of pairs.
    """

    n_correct: Counter[int] = field(default_factory=Counter)
    n_targets: Counter[int] = field(default_factory=Counter)

    def __add__(self, other: RecallScore) -> RecallScore:
        # `update` keeps counts of zero, which the sum of two counters drops.
        correct, targets = Counter(self.n_correct), Counter(self.n_targets)
        correct.update(other.n_correct)
        targets.update(other.n_targets)
        return RecallScore(correct, targets)

    @property
    def accuracy(self) -> float:
        """Share of all targets that are correct.

        Raises:
            ValueError: there is no target.
        """
        if not self.n_targets.total():
            raise ValueError("batches: no target to score")
        return self.n_correct.total() / self.n_targets.total()

    @property
    def by_pairs(self) -> dict[int, float]:
        """Share of correct targets for each number of pairs, in rising order."""
        return {n: self.n_correct[n] / total for n, total in sorted(self.n_targets.items()) if n and total}


@torch.inference_mode()
def score_recall(model: LanguageModel, batch: Batch) -> RecallScore:
    """Scores one batch, ignoring targets of -100."""
    asked = batch.targets != IGNORED
    hidden, _ = model.hidden(batch.inputs)
    # A quantised head has scales that depend on all of its input.
    logits = model.head(hidden)[asked] if model.head.is_quantized else model.head(hidden[asked])
    hits = (logits.argmax(-1) == batch.targets[asked]).tolist()
    rows = asked.nonzero()[:, 0].tolist()
    numbers = batch.n_pairs or (0,) * len(asked)
    correct = Counter(numbers[row] for row, hit in zip(rows, hits, strict=True) if hit)
    return RecallScore(correct, Counter(numbers[row] for row in rows))


def recall_score(model: LanguageModel, batches: Iterable[Batch]) -> RecallScore:
    """Scores all batches."""
    return sum((score_recall(model, batch) for batch in batches), start=RecallScore())


def recall_accuracy(model: LanguageModel, batches: Iterable[Batch]) -> float:
    """Share of the targets, ignoring -100, that are the model's first choice.

    Raises:
        ValueError: there is no target.
    """
    return recall_score(model, batches).accuracy
