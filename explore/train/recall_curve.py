"""Recall over the steps of a run: when it is learned, and a run that ends there."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pandas as pd
from lightning import Callback, LightningModule, Trainer

from explore.experiment import Experiment

LEARNED = 0.9
"""Validation recall from which the task counts as learned; `steps_to_90` is named after it."""


def recall_curve(metrics: pd.DataFrame) -> dict[int, float]:
    """Validation recall by steps done, as `metrics.csv` has it."""
    if "val_recall" not in metrics:
        return {}
    rows = metrics.dropna(subset="val_recall")
    return {int(step): float(value) for step, value in zip(rows["step"], rows["val_recall"], strict=True)}


def curve_scores(experiment: Experiment, curve: Mapping[int, float]) -> dict[str, Any]:
    """What a recall curve comes to.

    Returns:
        `steps_to_90`: the first validated step with a recall of 0.9, None where there is none. `recall_over_steps`: the
        mean over all steps of the budget, 0 before the first validation, between two validations the value of the
        earlier, and after the end of a run that was stopped its last value. Nothing without a validation.
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
    """Ends training at a validation with a recall that suffices, also where a run goes on from there.

    Args:
        recall: that suffices.
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
