"""Progress of a study: the trials that count, and whether its space is exhausted."""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from explore.study.claim import REPEATS
from explore.study.lease import is_left, is_rejected
from explore.study.sweep_file import TRIES

EXHAUSTED = "exhausted"
"""User attribute of a trial drawn when the grid had no point left."""


def is_counted(trial: FrozenTrial) -> bool:
    """Whether the trial was trained or failed; rejected trials and trials replaced by a retry do not count."""
    if trial.state == TrialState.PRUNED:
        return trial.user_attrs.get("outcome") == "pruned"
    return trial.state == TrialState.COMPLETE or (trial.state == TrialState.FAIL and not is_left(trial))


def n_counted(study: optuna.Study) -> int:
    """Number of trials of a study that were trained or failed."""
    return sum(map(is_counted, study.get_trials(deepcopy=False)))


def why_used_up(trials: Sequence[FrozenTrial]) -> str | None:
    """Why the space seems exhausted, judged by its last draws; None if it may hold new experiments.

    The study decides, not what one worker has seen, so restarting the sweep draws no more trials either.
    """
    if any(trial.state == TrialState.WAITING for trial in trials):
        return None
    exhausted = next((trial for trial in trials if trial.user_attrs.get(EXHAUSTED)), None)
    if exhausted is not None:
        return str(exhausted.user_attrs["reason"])
    reasons: list[str] = []
    for trial in reversed(trials):
        if trial.state == TrialState.RUNNING or is_left(trial):
            continue
        if not is_rejected(trial) or len(reasons) == TRIES:
            break
        reasons.append(str(trial.user_attrs.get("reason", "")))
    if len(reasons) < TRIES:
        return None
    others = [reason for reason in reasons if not reason.startswith(REPEATS)]
    n_repeats = len(reasons) - len(others)
    parts = [f"{n_repeats} repeat an experiment of the study"] if n_repeats else []
    parts += [f"{len(others)} were rejected, such as: {others[0]}"] if others else []
    return f"the space seems to be used up: of the last {TRIES} draws {' and '.join(parts)}"
