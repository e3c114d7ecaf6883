"""Repairs results of complete trials that are damaged or missing on disk, for example after a power cut."""

from __future__ import annotations

from optuna.trial import TrialState

from explore.runs import ENDED, walk_runs
from explore.study.storage import Say
from explore.study.worker import Worker


def repair_results(worker: Worker, say: Say) -> None:
    """Retrains complete trials whose result files are empty, damaged or missing, from their last checkpoint.

    Missing run folders are not restored: somebody may have deleted them for space.

    Args:
        say: receives one line per repaired run.
    """
    complete = worker.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    by_folder = {trial.user_attrs.get("run"): trial.number for trial in complete}
    numbers = {trial.number for trial in complete}
    for folder in walk_runs(worker.runs):
        about = folder.trial
        number = (
            about.get("trial") if about.get("study") == worker.study.study_name else by_folder.get(folder.path.name)
        )
        if number not in numbers or folder.status in ENDED:
            continue
        say(f"{folder.path}: trial {number} is complete, but its result is damaged or missing; computing it again")
        try:
            worker.fit(folder.load_experiment(), worker.runs)
        except ValueError as error:
            say(f"{folder.path}: its result cannot be computed again: {error}")
