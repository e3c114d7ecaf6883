"""The loop of a sweep: ask for a trial, train its experiment, tell the result."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optuna
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from explore import train
from explore.experiment import Experiment
from explore.runs import RunFolder
from explore.study.live import SweepTable
from explore.study.storage import INTERRUPTED, open_study
from explore.study.sweep_file import TRIES, RejectedError, Sweep, reason
from explore.tracking import WandbMode


@dataclass(frozen=True)
class SweepSummary:
    """How a study stands: trials by how they ended. Rejected ones were not trained."""

    complete: int
    failed: int
    rejected: int


def run_sweep(
    sweep: Sweep,
    n_trials: int,
    runs: Path,
    *,
    seed: int = 0,
    storage: str | None = None,
    checkpoint_every: int | None = None,
    wandb: WandbMode | None = None,
    console: Console | None = None,
) -> SweepSummary:
    """Runs a sweep until the study has `n_trials` trials that were trained or failed.

    What is there already counts, so the same call goes on after an interruption and does nothing when all
    is done. An experiment whose run is finished is not trained again; a trial that repeats an experiment of
    this study, or that the sweep file rejects, is told as pruned and not counted. It also ends after 200
    such trials in a row.

    Args:
        seed: with the number of a trial, it decides what the sampler draws.
        storage: Optuna storage URL instead of the journal file in `runs`.

    Raises:
        ValueError: another process is running this sweep.
    """
    console = console or Console(stderr=True)
    with open_study(sweep, runs, storage) as study, SweepTable(sweep, study, n_trials, console) as table:
        rejected_in_a_row = 0
        while len(counted(study)) < n_trials and rejected_in_a_row < TRIES:
            trial = _ask(study, seed)
            started = time.perf_counter()
            state, why = TrialState.FAIL, None
            values = None
            try:
                experiment = sweep.experiment(trial)
                _claim(study, trial, experiment)
                table.refresh()
                folder = train.fit(experiment, runs, checkpoint_every=checkpoint_every, wandb=wandb, console=console)
                state, values, why = _outcome(sweep, folder)
                trial.set_user_attr("run", folder.path.name)
            except RejectedError as rejection:
                state, why = TrialState.PRUNED, str(rejection)
            except Exception as error:  # whatever a trial dies of is its result; the sweep goes on
                why = reason(error, sweep.path)
            if why is not None:
                trial.set_user_attr("reason", why)
            trial.set_user_attr("took_s", time.perf_counter() - started)
            study.tell(trial, values, state)
            rejected_in_a_row = rejected_in_a_row + 1 if state == TrialState.PRUNED else 0
            table.refresh()
        return summary(study)


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that were trained or failed; interrupted and rejected ones are not among them."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
    return [trial for trial in trials if trial.user_attrs.get("reason") != INTERRUPTED]


def summary(study: optuna.Study) -> SweepSummary:
    """Counts the trials of a study by how they ended."""
    ended = counted(study)
    complete = sum(trial.state == TrialState.COMPLETE for trial in ended)
    rejected = len(study.get_trials(deepcopy=False, states=(TrialState.PRUNED,)))
    return SweepSummary(complete, len(ended) - complete, rejected)


def _ask(study: optuna.Study, seed: int) -> optuna.Trial:
    # A sampler of its own for every trial: what it draws depends on the trial's number, not on what this
    # process drew before.
    number = len(study.get_trials(deepcopy=False))
    draw = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    study.sampler = TPESampler(seed=draw)
    return study.ask()


def _claim(study: optuna.Study, trial: optuna.Trial, experiment: Experiment) -> None:
    """Writes what the trial trains into the study.

    Raises:
        RejectedError: another trial has trained it.
    """
    key = experiment.key()
    for other in counted(study):
        if other.user_attrs.get("key") == key:
            raise RejectedError(f"repeats trial {other.number}")
    cost = experiment.model.cost(experiment.data.seq_len)
    attributes = {
        "key": key,
        "family": experiment.model.family,
        "pattern": experiment.model.pattern,
        "params_total": cost.params_total,
        "params_active": cost.params_active,
        "flops_run": experiment.flops_run,
    }
    for name, value in attributes.items():
        trial.set_user_attr(name, value)


def _outcome(sweep: Sweep, folder: RunFolder) -> tuple[TrialState, list[float] | None, str | None]:
    row = folder.row()
    if row["status"] != "finished":
        return TrialState.FAIL, None, (folder.result or {}).get("reason")
    missing = [column for column in sweep.objectives if row[column] is None]
    if missing:
        return TrialState.FAIL, None, f"the run has no {', '.join(missing)}"
    return TrialState.COMPLETE, [float(row[column]) for column in sweep.objectives], None
