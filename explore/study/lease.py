"""Leases: a worker renews the mark on its trial; a trial whose mark stops changing is ended and queued again.

Leases work in any storage; Optuna's own heartbeats exist only in its relational one. The protocol:

1. A worker takes a trial from the study, which makes it RUNNING, and writes its mark, `lease`, to the trial's user
   attributes: its identity, its host, and a beat that increases every `BEAT_S` seconds.
2. Every worker checks all RUNNING trials before it takes one (`Reaper.reap`). A trial is dead if its mark has not
   changed for `LEASE_S` seconds, if its process ran on this machine and is gone, or if it gets no mark at all.
3. A dead trial is first ended (FAIL, outcome `interrupted`) and then queued again, as a new trial with the same
   parameters and `retry_of`. A process killed between the two leaves an ended trial without a retry, and the next
   reaper queues it. In the other order, the old trial and its retry could run at the same time.
4. Two processes may queue a retry of one trial at the same time. `is_doubled` then cancels the later of the two.

Clocks of different machines are never compared: each reaper measures with its own clock how long a mark has not
changed. Optuna rejects writes to a trial that has ended. So a worker that was only slow, and whose trial was reaped,
gets an UpdateFinishedTrialError at its next write and cannot end the trial a second time.
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
"""Seconds without a change after which a mark counts as dead: six beats, so that a few may be late or lost."""
MOST_ATTEMPTS = 20
"""Processes that may end during one trial before it counts as failed: the trial itself may be what kills them."""

INTERRUPTED = "interrupted"
"""Outcome of a trial whose worker is gone."""
RELEASED = "released"
"""Outcome of a trial that its worker gave back."""
REJECTED = "rejected"
"""Outcome of a trial that was rejected before training."""


def _place() -> str:
    """The host and its PID namespace: processes with the same place can look up each other's PID."""
    try:
        # Each container on a host has a PID namespace, so the same number can mean another process.
        space = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        space = 0
    return f"{socket.gethostname()}/{space}"


class Lease:
    """Holds a trial while the block runs.

    Raises:
        optuna.exceptions.UpdateFinishedTrialError: on entry, if the trial was already reaped.
    """

    def __init__(self, study: optuna.Study, trial: optuna.Trial) -> None:
        # Write to the storage: the trial's set_user_attr would also change the object that the training thread uses.
        self._storage, self._trial_id = study._storage, trial._trial_id
        # The random name makes sure that no two leases write equal marks.
        self._mark = {"worker": uuid.uuid4().hex[:8], "place": _place(), "pid": os.getpid()}
        self._ended = threading.Event()
        # A separate thread, because training blocks for minutes; a daemon, so that the process need not wait for it.
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> None:
        self._beat(0)  # in this thread, so that an error of a trial that was reaped already reaches the worker
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The thread is not joined: a beat may hang on an unreachable storage, and one more beat does no harm.
        self._ended.set()

    def _renew(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT_S):  # a sleep that stops when the block ends
            beat += 1
            try:
                self._beat(beat)
            except optuna.exceptions.UpdateFinishedTrialError:  # reaped: the worker gets the same error when it writes
                return
            except Exception:  # the disk is full or the server unreachable: the next beat may succeed
                continue

    def _beat(self, beat: int) -> None:
        self._storage.set_trial_user_attr(self._trial_id, "lease", {**self._mark, "beat": beat})


class Reaper:
    """Finds trials whose worker is gone, and puts them back in the queue with their parameters."""

    def __init__(self) -> None:
        # The last mark seen on each trial, and when this process first saw it. A new process has seen none, so it needs
        # LEASE_S to judge a lease from another machine.
        self._seen: dict[int, tuple[Any, float]] = {}

    def reap(self, study: optuna.Study) -> None:
        """Ends the trials whose lease is dead, and queues a retry of every ended trial that has none."""
        trials = study.get_trials(deepcopy=False)
        dead = [trial for trial in trials if trial.state == TrialState.RUNNING and self._is_dead(trial)]
        for trial in dead:
            leave(study, trial)
        # Read again after the writes: another process may have ended and queued the same trials. Called even if no
        # trial is dead, for trials given back, or ended by a process that was killed before it queued them.
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
        # A process on this machine can be looked up, which saves the wait. If another process has its PID by now, the
        # lease expires like one from another machine.
        gone = lease["place"] == _place() and not _runs(lease["pid"])
        return gone or now - since > LEASE_S


def leave(study: optuna.Study, trial: FrozenTrial, outcome: str = INTERRUPTED) -> None:
    """Ends an unfinished trial. Its checkpoints stay on disk under the experiment's key, for the retry.

    Args:
        outcome: `INTERRUPTED` counts as an attempt; `RELEASED`, for a trial that its worker gave back, does not.
    """
    attempts = trial.user_attrs.get("attempt", 1)
    about = {"outcome": outcome}
    if outcome == INTERRUPTED and attempts >= MOST_ATTEMPTS:
        about = {"outcome": "failed", "reason": f"{attempts} processes ended while they trained it"}
    with suppress(optuna.exceptions.UpdateFinishedTrialError):  # another process has just ended it
        # Outcome first: an ended trial accepts no attributes, and FAIL without an outcome would count as a failure.
        for name, value in about.items():
            study._storage.set_trial_user_attr(trial._trial_id, name, value)
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def is_doubled(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
    """Whether an earlier trial is a retry of the same trial; only the retry with the lowest number runs.

    Two processes may queue a retry at the same time. The storage assigns numbers, so all processes see one order.
    """
    about = trial.user_attrs
    return "retry_of" in about and any(
        other.user_attrs.get("retry_of") == about["retry_of"] for other in trials if other.number < trial.number
    )


def is_left(trial: FrozenTrial) -> bool:
    """Whether a retry with the same parameters, queued or still to be queued, replaces the trial."""
    return trial.state == TrialState.FAIL and trial.user_attrs.get("outcome") in (INTERRUPTED, RELEASED)


def is_rejected(trial: FrozenTrial) -> bool:
    """Whether the trial was rejected before training."""
    return bool(trial.user_attrs.get("outcome") == REJECTED)


def _requeue(study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
    """Queues a retry of every interrupted or released trial that has none."""
    retried = {trial.user_attrs["retry_of"] for trial in trials if "retry_of" in trial.user_attrs}
    for trial in trials:
        if is_left(trial) and trial.number not in retried:
            about = trial.user_attrs
            attempt = about.get("attempt", 1) + (about["outcome"] == INTERRUPTED)
            study.enqueue_trial(
                # A trial reaped before it drew anything has no params, but may have been queued with some.
                {**trial.system_attrs.get("fixed_params", {}), **trial.params},
                # `draw`: the sampler is seeded with the number of the first attempt, so a retry draws the same values.
                user_attrs={"retry_of": trial.number, "draw": about.get("draw", trial.number), "attempt": attempt},
            )


def _runs(pid: int) -> bool:
    """Whether a process with this PID runs here."""
    try:
        os.kill(pid, 0)  # signal 0 only checks that the process exists
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, and belongs to another user
        return True
    return True
