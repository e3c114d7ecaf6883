"""Where a study lives: one journal file by default, or any storage that Optuna knows by URL."""

from __future__ import annotations

import fcntl
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import optuna
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import FrozenTrial, TrialState

from explore.study.sweep_file import Sweep

INTERRUPTED = "interrupted"


@contextmanager
def open_study(sweep: Sweep, runs: Path, url: str | None = None) -> Iterator[optuna.Study]:
    """Creates the study of a sweep, or opens it again.

    Trials that a killed process left running are put back in the queue with their parameters.

    Args:
        runs: folder of run folders; the journal lies in it.
        url: another storage instead of the journal.

    Raises:
        ValueError: another process works on this journal.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    runs.mkdir(parents=True, exist_ok=True)
    journal = runs / "study.journal"
    with nullcontext() if url else _alone(journal):
        study = optuna.create_study(
            storage=url or JournalStorage(JournalFileBackend(str(journal))),
            study_name=sweep.name,
            directions=list(sweep.objectives.values()),
            load_if_exists=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(sweep.objectives))
        if url is None:
            _requeue(study, study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
        if not study.get_trials(deepcopy=False):
            for baseline in sweep.baselines:
                study.enqueue_trial(dict(baseline))
        yield study


def _requeue(study: optuna.Study, left: list[FrozenTrial]) -> None:
    """Queues the parameters of trials whose process is gone, then ends those trials.

    In this order a kill in between can only queue a trial twice, which its key will tell.
    """
    for trial in left:
        study.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number})
        optuna.Trial(study, trial._trial_id).set_user_attr("reason", INTERRUPTED)
        study.tell(trial.number, state=TrialState.FAIL)


@contextmanager
def _alone(journal: Path) -> Iterator[None]:
    with journal.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{journal}: another process is running this sweep") from None
        yield
