"""A worker of a sweep: it takes a trial, trains its experiment, reports the result, and repeats."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.trial import TrialState
from rich.console import Console

from explore import train
from explore.experiment import Experiment
from explore.files import write_json
from explore.quantities import columns, quantity
from explore.runs import PILOTS, RunFolder
from explore.search.samplers import DrawnSampler, ExhaustedError
from explore.study.budgets import RejectedError
from explore.study.claim import claim
from explore.study.dashboard import annotate, note_rejection
from explore.study.faults import FaultError, fault_of
from explore.study.identity import check_data
from explore.study.lease import REJECTED, RELEASED, Lease, Reaper, is_doubled, leave
from explore.study.needs import check_needs
from explore.study.progress import EXHAUSTED, is_counted, why_used_up
from explore.study.sweep_file import Sweep, reason
from explore.table import expected_row
from explore.tracking import WandbMode

IDLE_S = 0.5


@dataclass(frozen=True, kw_only=True)
class TrialOptions:
    """Options for running trials; none of them changes results.

    Attributes:
        checkpoint_every: steps between checkpoints of a run, as in `fit`.
        wandb: mode of mirroring runs and sweep to Weights & Biases; None: do not mirror.
        prune: let the sweep file's pruner stop runs.
        notes: write a note and figures of each trial for optuna-dashboard.
    """

    checkpoint_every: int | None = None
    wandb: WandbMode | None = None
    prune: bool = True
    notes: bool = True


class Outcome(NamedTuple):
    """The outcome of a trial; `name` is `done`, `pruned`, `failed`, `diverged` or `rejected`."""

    name: str
    values: list[float] | None = None
    reason: str | None = None

    @property
    def state(self) -> TrialState:
        """The outcome as an Optuna state."""
        stopped = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED, REJECTED: TrialState.PRUNED}
        return stopped.get(self.name, TrialState.FAIL)


class Worker:
    """Works on a study until it has the requested trials."""

    def __init__(
        self,
        sweep: Sweep,
        study: optuna.Study,
        runs: Path,
        options: TrialOptions,
        console: Console,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.sweep, self.study, self.runs, self.options, self.console = sweep, study, runs, options, console
        self.changed = changed
        self.reaper = Reaper()
        study.sampler = DrawnSampler(study.user_attrs["sampler"], study.user_attrs["seed"], sweep.grid)

    def work(self, n_trials: int) -> None:
        """Runs trials until all workers together have trained or failed `n_trials`, or the space is exhausted.

        Raises:
            FaultError: a fault of the machine stopped the sweep; the current trial is given back.
        """
        try:
            self._work(n_trials)
        except Exception as error:
            if (fault := fault_of(error, self.runs)) is None:
                raise
            raise FaultError(f"{fault}; the sweep stops here; run the same command to resume it") from error

    def _work(self, n_trials: int) -> None:
        while True:
            self.reaper.reap(self.study)
            trials = self.study.get_trials(deepcopy=False)
            n_done = sum(map(is_counted, trials))
            if n_done >= n_trials or why_used_up(trials) is not None:
                return
            if n_done + sum(trial.state == TrialState.RUNNING for trial in trials) >= n_trials:
                time.sleep(IDLE_S)  # other workers train the last trials; this one takes over if they are lost
                continue
            trial = self.study.ask()
            try:
                with Lease(self.study, trial):
                    self._run_leased(trial, n_trials)
            except optuna.exceptions.UpdateFinishedTrialError:  # reaped before it had its lease
                continue
            except ExhaustedError as end:
                with suppress(optuna.exceptions.UpdateFinishedTrialError):
                    trial.set_user_attr(EXHAUSTED, True)
                self._tell(trial, Outcome(REJECTED, reason=str(end)), 0.0)

    def _run_leased(self, trial: optuna.Trial, n_trials: int) -> Outcome | None:
        """Runs a trial if it is within the requested number; gives it back if an exception ends the process."""
        if self._rank(trial.number) >= n_trials:
            leave(self.study, trial._cached_frozen_trial, RELEASED)
            return None
        try:
            return self.run(trial)
        except ExhaustedError:
            raise
        except BaseException:
            # If this write fails, the trial is reaped later.
            with suppress(OSError, ValueError, optuna.exceptions.StorageInternalError):
                leave(self.study, trial._cached_frozen_trial, RELEASED)
            raise

    def run(self, trial: optuna.Trial) -> Outcome:
        """Trains the experiment of a trial and reports the outcome to the study."""
        started = time.perf_counter()
        try:
            outcome = self._train(trial)
        except RejectedError as rejection:
            outcome = Outcome(REJECTED, reason=str(rejection))
        except ExhaustedError:
            raise
        except Exception as error:
            if fault_of(error, self.runs) is not None:
                raise
            outcome = Outcome("failed", reason=reason(error, self.sweep.path))
        self._tell(trial, outcome, time.perf_counter() - started)
        _give_memory_back()
        return outcome

    def _train(self, trial: optuna.Trial) -> Outcome:
        if is_doubled(trial._cached_frozen_trial, self.study.get_trials(deepcopy=False)):
            raise RejectedError("another trial is a retry of the same")
        experiment = self.sweep.experiment(trial)
        check_data(self.study, experiment)
        claim(self.study, trial, experiment.key(), self.reaper)
        self._describe(trial, experiment)
        self.changed()
        try:
            return self._train_claimed(trial, experiment)
        except Exception:
            # Check whether a missing or changed text, or too little disk or memory, caused the error.
            check_data(self.study, experiment)
            check_needs([experiment], self.runs)
            raise

    def _train_claimed(self, trial: optuna.Trial, experiment: Experiment) -> Outcome:
        about: dict[str, Any] = {"tuned": False}
        if self.sweep.learning_rates is not None:
            tuned = self.sweep.learning_rates.search(lambda lr: self._pilot(experiment, lr))
            experiment = experiment.model_copy(update={"train": experiment.train.model_copy(update={"lr": tuned.lr})})
            about = {"tuned": tuned.interior, "lr": tuned.lr, "lr_sensitivity": tuned.sensitivity}
            by = self.sweep.learning_rates.by
            sign = 1 if by is None else quantity(by).sign
            pilots = {lr: sign * score for lr, score in tuned.pilots.items()}
            for name, value in {**about, "lr_by": by, "lr_pilots": pilots}.items():
                trial.set_user_attr(name, value)
        folders = []
        for seed in range(self.sweep.seeds):
            seeded = experiment.model_copy(update={"seed": experiment.seed + seed})
            folder = self._fit_judged(seeded, trial if seed == 0 else None)
            self._record(trial, folder, about)
            folders.append(folder)
            if (folder.result or {}).get("status") != "finished":
                break
        trial.set_user_attr("run", folders[0].path.name)
        return self._outcome(folders)

    def _fit_judged(self, experiment: Experiment, judged: optuna.Trial | None) -> RunFolder:
        pruner = self.sweep.pruner if self.options.prune and judged is not None else None
        return self.fit(
            experiment,
            self.runs,
            checkpoint_every=self.options.checkpoint_every,
            wandb=self.options.wandb,
            group=self.study.study_name,
            rungs=(*self.sweep.rungs, *(() if pruner is None else pruner.rungs)),
            judge=None if pruner is None or judged is None else pruner.judge(self.study, judged),
        )

    def _pilot(self, experiment: Experiment, lr: float) -> float:
        assert self.sweep.learning_rates is not None
        pilot = self.sweep.learning_rates.pilot(experiment, lr)
        row = self.fit(pilot, self.runs / PILOTS).row()
        if row["status"] != "finished":
            return float("inf")
        if (by := self.sweep.learning_rates.by) is not None:
            return quantity(by).sign * float(row[by]) if _is_number(row[by]) else float("inf")
        if self.sweep.merging is not None:
            return float(row[self.sweep.merging.score(pilot)])
        return float(row["val_bpb"] if _is_number(row["val_bpb"]) else row["val_loss"])

    def fit(self, experiment: Experiment, runs: Path, **options: Any) -> RunFolder:
        """Trains an experiment; waits first if another study, or a worker that lost its lease, is training it."""
        merging = self.sweep.merging
        keep_every = None if merging is None else merging.keep_every(experiment)
        while True:
            try:
                folder = train.fit(experiment, runs, keep_every=keep_every, console=self.console, **options)
            except train.BusyError:
                time.sleep(IDLE_S)
                continue
            if merging is not None and keep_every is not None:
                merging.merge(folder)
            return folder

    def _describe(self, trial: optuna.Trial, experiment: Experiment) -> None:
        row = expected_row(experiment)
        costs = [
            each.name
            for each in columns()
            if each.role == "cost" and (each.headline or each.name in self.sweep.objectives)
        ]
        for name in ("name", "family", "pattern", *costs):
            trial.set_user_attr(name, row[name])

    def _record(self, trial: optuna.Trial, folder: RunFolder, about: dict[str, Any]) -> None:
        """Records in the run's folder which trial it belongs to; the first trial that trained it is kept."""
        path = folder.path / "trial.json"
        if not path.exists():
            frozen = {"study": self.study.study_name, "trial": trial.number, "params": trial.params}
            write_json(path, {**frozen, **about, "residuals": trial.user_attrs.get("residuals", {})})

    def _outcome(self, folders: list[RunFolder]) -> Outcome:
        rows = [folder.row() for folder in folders]
        status, why = rows[-1]["status"], (folders[-1].result or {}).get("reason")
        if status in ("pruned", "diverged"):
            return Outcome(status, reason=why)
        if status != "finished":
            return Outcome("failed", reason=why or status)
        missing = [name for name in self.sweep.objectives if not all(_is_number(row[name]) for row in rows)]
        if missing:
            return Outcome("failed", reason=f"the run has no {', '.join(missing)}")
        return Outcome(
            "done", [statistics.fmean(float(row[column]) for row in rows) for column in self.sweep.objectives]
        )

    def _tell(self, trial: optuna.Trial, outcome: Outcome, took_s: float) -> None:
        attributes = {"outcome": outcome.name, "reason": outcome.reason, "took_s": took_s}
        try:
            for name, value in attributes.items():
                if value is not None:
                    trial.set_user_attr(name, value)
            if self.options.notes and outcome.name != REJECTED and "run" in trial.user_attrs:
                folder = RunFolder(self.runs / trial.user_attrs["run"])
                annotate(self.study, trial._cached_frozen_trial, folder, self.runs / "artifacts")
            elif self.options.notes and outcome.name == REJECTED:
                note_rejection(self.study, trial._cached_frozen_trial, outcome.reason)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings of experimental samplers
                self.study.tell(trial, outcome.values, outcome.state, skip_if_finished=True)
        except optuna.exceptions.UpdateFinishedTrialError:
            return  # reaped while this process was suspended: the retry finds the run by its key
        self.changed()

    def _rank(self, number: int) -> int:
        """Number of earlier trials that count towards the requested number."""
        trials = self.study.get_trials(deepcopy=False)[:number]
        return sum(is_counted(trial) or trial.state == TrialState.RUNNING for trial in trials)


def _give_memory_back() -> None:
    """Returns freed memory to the system. glibc would keep fragments, and a worker would grow for hours."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _is_number(value: Any) -> bool:
    return value is not None and not math.isnan(value)
