"""Runs a sweep with one or more workers: this process, several on this machine, or cluster jobs, all on one study.

Workers share only the study's storage and the folder of runs. Each runs the same loop, `Worker.work`, and exits when
the study has its trials. The process that started them does not hand out trials: it draws the table, replaces workers
that were killed, and stops them all when it is interrupted. So further workers can be started by hand on any host.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from rich.console import Console

from explore.foreign import check_type
from explore.records import pack_runs, unpack_runs
from explore.search.samplers import make_sampler
from explore.study.dashboard import describe_study
from explore.study.identity import open_study
from explore.study.lease import is_rejected
from explore.study.live import SweepTable
from explore.study.mirroring import GrowingFrontier, send_sweep
from explore.study.needs import check_needs
from explore.study.processes import Cluster, Post, work_here, work_on_cluster
from explore.study.progress import is_counted, why_used_up
from explore.study.repair import repair_results
from explore.study.secrets import hide_in_arguments
from explore.study.storage import Say, open_storage
from explore.study.sweep_file import Sweep
from explore.study.watching import N_TRIALS
from explore.study.worker import TrialOptions, Worker
from explore.terminal import plain_console

RECORD_S = 3600.0
"""Seconds between writes of a sweep's records."""


@dataclass(frozen=True)
class SweepSummary:
    """Numbers of trials of a study by outcome. Rejected trials were not trained."""

    study: str
    complete: int
    pruned: int
    failed: int
    rejected: int


def run_sweep(
    sweep: Sweep,
    n_trials: int,
    runs: str | Path,
    *,
    sampler: str | None = None,
    seed: int | None = None,
    storage: str | None = None,
    new_study: bool = False,
    workers: int = 1,
    cluster: Cluster | None = None,
    cluster_options: Mapping[str, Any] | None = None,
    records: str | Path | None = None,
    options: TrialOptions | None = None,
    console: Console | None = None,
) -> SweepSummary:
    """Runs a sweep until the study has `n_trials` trials that were trained or failed.

    Existing trials count, so the same call resumes after an interruption and does nothing when all is done.
    An experiment whose run is finished is not trained again; a trial that repeats an experiment of this
    study, or that the sweep file rejects, is reported to Optuna as pruned and not counted. A worker also exits
    after 200 such trials in a row. Any number of processes on any hosts may work on one study.

    Args:
        sampler: name of the sampler of a new study; default: the sweep file's.
        seed: sampler seed; the draw of a trial depends only on it and the trial's number.
        storage: URL of a storage; default: the journal file in `runs`.
        new_study: start a new study even if this sweep file has one.
        workers: number of processes that share this machine's cores, or of cluster jobs.
        cluster: submit the workers with submitit, to SLURM or as local processes, and return when all have ended.
        cluster_options: parameters of submitit's executor, such as `{"slurm_partition": "gpu", "timeout_min": 600}`.
        records: a table of records (`explore.records`). Its runs are not trained again; ended runs are added to it
            every hour and at the end.

    Raises:
        TypeError: `sweep` is not a sweep, or `runs` not a folder.
        ValueError: the sampler is unknown, the storage does not open, the study belongs to another file, or
            (`FaultError`) a fault of the machine stopped the sweep.
    """
    check_type(sweep, Sweep, "sweep must be a sweep, as explore.load_sweep gives it")
    check_type(n_trials, Integral, "n_trials must be a whole number")
    check_type(runs, (str, Path), "runs must be the folder of the runs")
    runs = Path(runs)
    console, options = console or plain_console(), options or TrialOptions()
    say = partial(console.print, highlight=False, soft_wrap=True)
    # Find user mistakes in the sampler, the storage and the study before a worker starts.
    make_sampler(sampler or sweep.sampler, seed or 0, 0, grid=sweep.grid)
    check_needs(sweep.examples, runs, workers, elsewhere=cluster == "slurm")
    hide_in_arguments(storage)
    study = open_study(sweep, open_storage(runs, storage, say), sampler=sampler, seed=seed, new=new_study)
    study.set_user_attr(N_TRIALS, n_trials)
    if options.notes:
        describe_study(study, sweep.question)
    with _kept(None if records is None else Path(records), runs, say), SweepTable(study, n_trials, console) as table:
        frontier = GrowingFrontier(study, runs, say)

        def refresh() -> None:
            table.refresh()
            if options.notes:
                frontier.refresh()

        worker = Worker(sweep, study, runs, options, console, refresh)
        repair_results(worker, say)
        if workers == 1 and cluster is None:
            worker.work(n_trials)
        else:
            parent = os.getpid() if cluster is None else None
            # Absolute paths: a cluster job may start in another folder.
            file, place = sweep.path.resolve(), runs.resolve()
            post = Post(file, study.study_name, storage, place, n_trials, options, parent, sweep.parameters)
            if cluster is None:
                work_here(post, study, workers, refresh)
            else:
                work_on_cluster(post, study, workers, cluster, cluster_options or {}, refresh)
        if options.notes:
            frontier.refresh(is_last=True)
    if options.wandb is not None:
        send_sweep(study, runs, options.wandb, say)
    _report_problems(study, n_trials, say)
    return summary(study)


def _report_problems(study: optuna.Study, n_trials: int, say: Say) -> None:
    """Prints why there are fewer trials than requested, and why they failed if all did."""
    trials = study.get_trials(deepcopy=False)
    ended = [trial for trial in trials if is_counted(trial)]
    if len(ended) < n_trials and (why := why_used_up(trials)) is not None:
        say(f"{study.study_name}: {len(ended)} of {n_trials} trials: {why}")
    if ended and all(trial.state == TrialState.FAIL for trial in ended):
        about = ended[-1].user_attrs
        say(f"all {len(ended)} trials failed; the last one: {about.get('reason', about.get('outcome'))}")


def summary(study: optuna.Study) -> SweepSummary:
    """Counts the trials of a study by outcome."""
    trials = study.get_trials(deepcopy=False)
    ended = Counter(trial.state for trial in trials if is_counted(trial))
    rejected = sum(map(is_rejected, trials))
    complete, pruned, failed = (ended[state] for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
    return SweepSummary(study.study_name, complete, pruned, failed, rejected)


@contextlib.contextmanager
def _kept(records: Path | None, runs: Path, say: Say) -> Iterator[None]:
    """Unpacks the runs of a table of records, and adds runs that end within the block, hourly and at its end.

    Writing hourly means that a lost machine costs at most an hour of runs.
    """
    if records is None:
        yield
        return
    if records.exists() and (n := unpack_runs(records, runs)):
        say(f"{records}: loaded {n} runs, which are not trained again")
    pack_runs(records, runs)  # now, or a wrong name or folder would be noticed only after hours
    over = threading.Event()

    def keep() -> None:
        while not over.wait(RECORD_S):  # a sleep that stops when the block ends
            try:
                pack_runs(records, runs)
            except (OSError, ValueError) as error:  # the next write may succeed; the last one raises again
                say(f"{records}: {error}")

    clerk = threading.Thread(target=keep, daemon=True)
    clerk.start()
    try:
        yield
    finally:
        over.set()
        clerk.join()  # two writers of one file would overwrite each other
        pack_runs(records, runs)
