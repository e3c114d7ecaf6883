"""Claims: if several trials of a study have the same experiment, on any hosts, only one trains it."""

from __future__ import annotations

import time

import optuna
from optuna.trial import FrozenTrial, TrialState

from explore.study.budgets import RejectedError
from explore.study.lease import Reaper, is_left, is_rejected

POLL_S = 0.2
REPEATS = "repeats trial"
"""First words of the rejection reason if the study already has the trial's experiment."""


def claim(study: optuna.Study, trial: optuna.Trial, key: str, reaper: Reaper) -> None:
    """Claims the experiment with this key for the trial, or rejects the trial.

    Every trial writes its claim before it reads the others' claims, so if two claim at once at least one sees the
    other. The lower trial number wins, unless the higher one has already confirmed its claim.

    Raises:
        RejectedError: another trial has the experiment.
    """
    trial.set_user_attr("key", key)
    while True:
        others = [other for other in study.get_trials(deepcopy=False) if _claims(other, key, trial.number)]
        for other in others:
            if other.state != TrialState.RUNNING or "confirmed" in other.user_attrs or other.number < trial.number:
                raise RejectedError(f"{REPEATS} {other.number}")
        if not others:
            trial.set_user_attr("confirmed", True)
            return
        time.sleep(POLL_S)  # a trial with a higher number is about to give way or confirm, or is dead
        reaper.reap(study)


def _claims(other: FrozenTrial, key: str, number: int) -> bool:
    if other.number == number or other.user_attrs.get("key") != key:
        return False
    return not is_left(other) and not is_rejected(other)
