"""Recall accuracy on synthetic data."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from explore.data import Batch
from explore.model import LanguageModel


@torch.inference_mode()
def recall_accuracy(model: LanguageModel, batches: Iterable[Batch]) -> float:
    """Share of the targets (those that are not -100) that are the model's first choice.

    Raises:
        ValueError: there is no target.
    """
    n_correct = n_targets = 0
    for batch in batches:
        asked = batch.targets != -100
        best = model(batch.inputs).argmax(-1)
        n_correct += int((best == batch.targets)[asked].sum())
        n_targets += int(asked.sum())
    if not n_targets:
        raise ValueError("batches: no target to score")
    return n_correct / n_targets
