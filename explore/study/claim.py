"""Claims: of all trials of a study with one experiment, in any processes on any hosts, one trains it."""

from __future__ import annotations

import time

import optuna
from optuna.trial import FrozenTrial, TrialState

from explore.study.budgets import RejectedError
from explore.study.lease import Reaper, is_left, is_rejected

POLL_S = 0.2
REPEATS = "repeats trial"
"""How the reason of a trial begins whose experiment the study has already."""


def claim(study: optuna.Study, trial: optuna.Trial, key: str, reaper: Reaper) -> None:
    """Takes the experiment with this key for the trial, or refuses the trial.

    Every trial writes its claim before it reads those of others, so of two at once at least one sees the other. The
    lower number goes on and the higher gives way, unless the higher has confirmed already.

    Raises:
        RejectedError: another trial has it.
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
        time.sleep(POLL_S)  # a higher one is about to give way, to confirm, or dead
        reaper.reap(study)


def _claims(other: FrozenTrial, key: str, number: int) -> bool:
    if other.number == number or other.user_attrs.get("key") != key:
        return False
    return not is_left(other) and not is_rejected(other)
