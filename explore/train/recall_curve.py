"""Recall over the steps of a run: when the task is learned, and a callback that stops the run there."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pandas as pd
from lightning import Callback, LightningModule, Trainer

from explore.experiment import Experiment

LEARNED = 0.9
"""Validation recall at which the task counts as learned; `steps_to_90` is named after it."""


def recall_curve(metrics: pd.DataFrame) -> dict[int, float]:
    """Reads validation recall by steps done from the rows of `metrics.csv`."""
    if "val_recall" not in metrics:
        return {}
    rows = metrics.dropna(subset="val_recall")
    return {int(step): float(value) for step, value in zip(rows["step"], rows["val_recall"], strict=True)}


def curve_scores(experiment: Experiment, curve: Mapping[int, float]) -> dict[str, Any]:
    """Summarises a recall curve.

    Returns:
        `steps_to_90`: the first validated step with a recall of at least 0.9, else None. `recall_over_steps`: the mean
        over all steps of the budget, counting 0 before the first validation, the latest value after each validation,
        and the last value after a run that stopped early. Empty without a validation.
    """
    if not curve:
        return {}
    steps = [*sorted(curve), experiment.n_steps]
    area = sum(curve[step] * (following - step) for step, following in pairwise(steps))
    return {
        "steps_to_90": next((step for step in steps if curve.get(step, 0.0) >= LEARNED), None),
        "recall_over_steps": area / experiment.n_steps,
    }


class StopsAtRecall(Callback):
    """Ends training once validation recall reaches a threshold, also if an earlier part of the run reached it.

    Args:
        recall: the threshold.
        earlier: validations of the run so far, by step.
    """

    def __init__(self, recall: float, earlier: Mapping[int, float]) -> None:
        self.recall, self.earlier = recall, earlier

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if any(value >= self.recall for step, value in self.earlier.items() if step <= trainer.global_step):
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if float(trainer.callback_metrics["val_recall"]) >= self.recall:
            trainer.should_stop = True
