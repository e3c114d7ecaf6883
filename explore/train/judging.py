"""The learning curve during training: when a run is validated, and when a judge may stop it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer

from explore.experiment import Experiment
from explore.runs import PRUNED, RunFolder

Judge = Callable[[float, float], str | None]
"""Called at every validation with the fraction of steps done and the bits per byte; a returned reason stops the run."""


def has_ended(folder: RunFolder, judge: Judge | None) -> bool:
    """Whether there is nothing left to train; a pruned run has ended only if there is a judge."""
    return folder.is_finished or (judge is not None and folder.status == PRUNED)


def read_curve(folder: RunFolder, points: Mapping[int, float], until: float = math.inf) -> list[tuple[float, float]]:
    """Reads the points of a run's curve from disk: fractions of the schedule, and bits per byte."""
    metrics = folder.metrics
    if "val_bpb" not in metrics:
        return []
    rows = metrics.dropna(subset="val_bpb")
    found = {int(step): float(value) for step, value in zip(rows["step"], rows["val_bpb"], strict=True)}
    return [(points[step], value) for step, value in found.items() if step in points and step <= until]


def check_judged(experiment: Experiment, points: Mapping[int, float]) -> None:
    """Raises an error if the judge would never be called.

    Raises:
        ValueError: the data has no bits per byte, or the run is validated only at its end.
    """
    if experiment.data.kind != "text":
        raise ValueError(f"judge: the data must be text, got {experiment.data.kind}, which has no bits per byte")
    if not points:
        raise ValueError("judge: the run is never validated before its end; set train.val_every, or give rungs")


class LearningCurve(Callback):
    """Validates at the given steps, and stops training when the judge returns a reason.

    A resumed run passes its earlier points to the judge first, so the judge sees the whole curve.

    Attributes:
        reason: why the judge stopped the run.
        value: bits per byte of the last point that the judge was called with.
    """

    def __init__(
        self,
        points: Mapping[int, float],
        n_steps: int,
        judge: Judge | None = None,
        earlier: list[tuple[float, float]] | None = None,
    ) -> None:
        self.points, self.n_steps, self.judge = points, n_steps, judge
        self.earlier = earlier or []
        self.reason: str | None = None
        self.value: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Resuming from a checkpoint written after a validation, Lightning skips that validation if it is due.
        self._validate_next(trainer, due=trainer.global_step > 0)
        if self.judge is not None:
            self._ask(trainer, self.earlier)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._validate_next(trainer, due=trainer.global_step in self.points)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.judge is not None:
            self._ask(trainer, [(self.points[trainer.global_step], float(trainer.callback_metrics["val_bpb"]))])

    def _validate_next(self, trainer: Trainer, due: bool) -> None:
        trainer.val_check_batch = 1 if due else self.n_steps + 1

    def _ask(self, trainer: Trainer, points: list[tuple[float, float]]) -> None:
        """Calls the judge in the process that writes the record, and broadcasts the answer."""
        reason = None
        if self.judge is not None and trainer.is_global_zero:
            reason = first_reason(self.judge, points)
            self.value = points[-1][1] if points else None
        if (reason := trainer.strategy.broadcast(reason)) is not None:
            self.reason = reason
            trainer.should_stop = True


def first_reason(judge: Judge, points: list[tuple[float, float]]) -> str | None:
    """Passes points of a curve to a judge; returns its first reason to stop before the end, or None."""
    reasons = [(fraction, judge(fraction, value)) for fraction, value in points if math.isfinite(value)]
    return next((reason for fraction, reason in reasons if reason is not None and fraction < 1), None)
