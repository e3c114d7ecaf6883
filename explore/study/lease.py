"""Leases: a worker marks its trial as alive again and again; a trial whose mark stands still is reaped.

It works in any storage; Optuna's own heartbeats exist in its relational one only. No clock is compared with another:
a lease is judged by how long its mark stood still before whoever judges, or by its process where that ran here.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

BEAT_S = 15.0
"""Seconds between two renewals."""
LEASE_S = 90.0
"""Seconds after which a mark that stands still is taken for dead."""
MOST_ATTEMPTS = 20
"""Processes that may die of one trial before it counts as failed: it may be the trial that kills them."""

INTERRUPTED = "interrupted"
"""Outcome of a trial whose worker is gone."""
RELEASED = "released"
"""Outcome of a trial that its worker gave back."""
REJECTED = "rejected"
"""Outcome of a trial that was turned away before training."""


def _place() -> str:
    """Where process numbers mean something: the host and its name space of processes."""
    try:
        space = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        space = 0
    return f"{socket.gethostname()}/{space}"


class Lease:
    """Holds a trial for as long as the block runs.

    Raises:
        optuna.exceptions.UpdateFinishedTrialError: on entry, where the trial was reaped before.
    """

    def __init__(self, study: optuna.Study, trial: optuna.Trial) -> None:
        self._storage, self._trial_id = study._storage, trial._trial_id
        self._mark = {"worker": uuid.uuid4().hex[:8], "place": _place(), "pid": os.getpid()}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> None:
        self._beat(0)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()

    def _renew(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT_S):
            beat += 1
            try:
                self._beat(beat)
            except optuna.exceptions.UpdateFinishedTrialError:  # reaped: the loop of the worker will find out
                return
            except Exception:  # the disk is full, or the server away for long: perhaps not at the next beat
                continue

    def _beat(self, beat: int) -> None:
        self._storage.set_trial_user_attr(self._trial_id, "lease", {**self._mark, "beat": beat})


class Reaper:
    """Finds trials whose worker is gone, and puts them back in the queue with their parameters."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Any, float]] = {}

    def reap(self, study: optuna.Study) -> None:
        """Ends the trials whose lease is dead and queues them again; the next call makes good a kill in between."""
        trials = study.get_trials(deepcopy=False)
        dead = [trial for trial in trials if trial.state == TrialState.RUNNING and self._is_dead(trial)]
        for trial in dead:
            leave(study, trial)
        _requeue(study, study.get_trials(deepcopy=False) if dead else trials)

    def _is_dead(self, trial: FrozenTrial) -> bool:
        lease = trial.user_attrs.get("lease")
        now = time.monotonic()
        mark, since = self._seen.setdefault(trial.number, (lease, now))
        if mark != lease:
            self._seen[trial.number] = (lease, now)
            return False
        if lease is None:  # its worker was killed before it took the lease, or is about to take it
            return now - since > BEAT_S
        gone = lease["place"] == _place() and not _runs(lease["pid"])
        return gone or now - since > LEASE_S


def leave(study: optuna.Study, trial: FrozenTrial, outcome: str = INTERRUPTED) -> None:
    """Ends a trial that was not brought to its end; what is done already stays on disk, under its key."""
    attempts = trial.user_attrs.get("attempt", 1)
    about = {"outcome": outcome}
    if outcome == INTERRUPTED and attempts >= MOST_ATTEMPTS:
        about = {"outcome": "failed", "reason": f"{attempts} processes ended while they trained it"}
    with suppress(optuna.exceptions.UpdateFinishedTrialError):  # by another process, just now
        for name, value in about.items():
            study._storage.set_trial_user_attr(trial._trial_id, name, value)
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def is_doubled(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
    """Whether an earlier trial is a retry of the same: two processes may find at once that one is to be retried."""
    about = trial.user_attrs
    return "retry_of" in about and any(
        other.user_attrs.get("retry_of") == about["retry_of"] for other in trials if other.number < trial.number
    )


def is_left(trial: FrozenTrial) -> bool:
    """Whether the trial's parameters are left to another trial, which has them or will have them."""
    return trial.state == TrialState.FAIL and trial.user_attrs.get("outcome") in (INTERRUPTED, RELEASED)


def is_rejected(trial: FrozenTrial) -> bool:
    """Whether the trial was turned away before training."""
    return bool(trial.user_attrs.get("outcome") == REJECTED)


def _requeue(study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
    retried = {trial.user_attrs["retry_of"] for trial in trials if "retry_of" in trial.user_attrs}
    for trial in trials:
        if is_left(trial) and trial.number not in retried:
            about = trial.user_attrs
            attempt = about.get("attempt", 1) + (about["outcome"] == INTERRUPTED)
            study.enqueue_trial(
                {**trial.system_attrs.get("fixed_params", {}), **trial.params},
                user_attrs={"retry_of": trial.number, "draw": about.get("draw", trial.number), "attempt": attempt},
            )


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
