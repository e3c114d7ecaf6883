"""Who works on a sweep: this process, several on this machine, or jobs of a cluster; all of them on one study.

Workers share nothing but the study's storage and the folder of runs. Each of them runs the same loop, `Worker.work`,
and ends by itself when the study has its trials. The process that started them hands out no trials: it draws the table,
replaces workers that were killed, and ends them all when it is interrupted. So workers may also be started by hand, on
any host, beside these.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import TrialState
from rich.console import Console

from explore.records import pack_runs, unpack_runs
from explore.search.samplers import make_sampler
from explore.study.dashboard import describe_study
from explore.study.identity import open_study
from explore.study.lease import is_rejected
from explore.study.live import SweepTable
from explore.study.mirroring import send_sweep
from explore.study.storage import PATIENCE_S, open_storage
from explore.study.sweep_file import Sweep, load_sweep
from explore.study.watching import N_TRIALS
from explore.study.worker import TrialOptions, Worker, is_counted, n_counted
from explore.threads import SHARE, n_cores

Cluster = Literal["slurm", "local"]
REDRAW_S = 1.0
RECORD_S = 3600.0
"""Seconds between two writes of the records of a sweep."""
DEATHS = 5
"""Deaths for each worker, without a trial that ends in between, after which the sweep ends with an error."""
GRACE_S = 10.0
"""Seconds that a worker has to give its trial back after SIGTERM, before it is killed."""


@dataclass(frozen=True)
class SweepSummary:
    """How a study stands: trials by how they ended. Rejected ones were not trained."""

    study: str
    complete: int
    pruned: int
    failed: int
    rejected: int


@dataclass(frozen=True)
class _Post:
    """What a worker in another process needs to know; it can be pickled.

    Attributes:
        file: the sweep file. The worker loads it again, because the functions in it cannot be pickled.
        parent: process that the worker must not outlive; none for jobs of a cluster, which run on other hosts.
    """

    file: Path
    study: str
    storage: str | None
    runs: Path
    n_trials: int
    options: TrialOptions
    parent: int | None


def run_sweep(
    sweep: Sweep,
    n_trials: int,
    runs: Path,
    *,
    sampler: str | None = None,
    seed: int | None = None,
    storage: str | None = None,
    new_study: bool = False,
    workers: int = 1,
    cluster: Cluster | None = None,
    cluster_options: Mapping[str, Any] | None = None,
    records: Path | None = None,
    options: TrialOptions | None = None,
    console: Console | None = None,
) -> SweepSummary:
    """Runs a sweep until the study has `n_trials` trials that were trained or failed.

    What is there already counts, so the same call goes on after an interruption and does nothing when all
    is done. An experiment whose run is finished is not trained again; a trial that repeats an experiment of
    this study, or that the sweep file rejects, is told as pruned and not counted. A worker also ends after 200
    such trials in a row. Any number of processes on any hosts may work on one study.

    Args:
        sampler: name of the sampler of a new study, instead of the sweep file's.
        seed: with the number of a trial, it decides what the sampler draws.
        storage: URL of a storage instead of the journal file in `runs`.
        new_study: begin another study, beside those of this sweep file that are there.
        workers: processes, which share the cores of this machine; or jobs of the cluster.
        cluster: submit the workers with submitit, to SLURM or as processes here, and return when all have ended.
        cluster_options: parameters of submitit's executor, such as `{"slurm_partition": "gpu", "timeout_min": 600}`.
        records: a table of records, `explore.records`: its runs are not trained again, and every hour and in the end
            the runs that have ended are added to it.

    Raises:
        ValueError: there is no such sampler, the storage does not open, the study is of another file, or the disk
            cannot be written.
    """
    console, options = console or Console(stderr=True), options or TrialOptions()
    # Whatever a person can get wrong is found here, before a worker starts: the sampler, the storage, the study.
    make_sampler(sampler or sweep.sampler, seed or 0, 0, grid=sweep.grid)
    opened = open_storage(runs, storage, lambda line: console.print(line, highlight=False))
    study = open_study(sweep, opened, sampler=sampler, seed=seed, new=new_study)
    study.set_user_attr(N_TRIALS, n_trials)
    if options.notes:
        describe_study(study, sweep.question)
    with _kept(records, runs, console), SweepTable(study, n_trials, console) as table:
        if workers == 1 and cluster is None:
            Worker(sweep, study, runs, options, console, table.refresh).work(n_trials)
        else:
            parent = os.getpid() if cluster is None else None
            # Whole paths: a job of a cluster may start in another folder.
            post = _Post(sweep.path.resolve(), study.study_name, storage, runs.resolve(), n_trials, options, parent)
            if cluster is None:
                _work_here(post, study, workers, table)
            else:
                _work_on_cluster(post, study, workers, cluster, cluster_options or {}, table)
    if options.wandb is not None:
        send_sweep(study, runs, options.wandb, lambda line: console.print(line, highlight=False))
    return summary(study)


def summary(study: optuna.Study) -> SweepSummary:
    """Counts the trials of a study by how they ended."""
    trials = study.get_trials(deepcopy=False)
    ended = Counter(trial.state for trial in trials if is_counted(trial))
    rejected = sum(map(is_rejected, trials))
    complete, pruned, failed = (ended[state] for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
    return SweepSummary(study.study_name, complete, pruned, failed, rejected)


@contextlib.contextmanager
def _kept(records: Path | None, runs: Path, console: Console) -> Iterator[None]:
    """Unpacks the runs of a table of records, and adds to the table what ends inside the block, hourly and at its end.

    Hourly, so that a machine that is lost takes at most an hour of runs with it.
    """
    if records is None:
        yield
        return
    if records.exists() and (n := unpack_runs(records, runs)):
        console.print(f"{records}: {n} runs taken up, which are not trained again", highlight=False)
    over = threading.Event()

    def keep() -> None:
        while not over.wait(RECORD_S):  # a sleep that ends at once when the block does
            pack_runs(records, runs)

    clerk = threading.Thread(target=keep, daemon=True)
    clerk.start()
    try:
        yield
    finally:
        over.set()
        clerk.join()  # two writers of one file would overwrite each other
        pack_runs(records, runs)


def _work_here(post: _Post, study: optuna.Study, workers: int, table: SweepTable) -> None:
    """Starts processes that share the cores, and waits for them.

    A worker ends in one of three ways. With exit code 0 and no message: the study has its trials. With a message: it
    gave up for a reason that the others would meet too, such as a full disk, so the sweep ends. Otherwise it was
    killed, for example for memory: another takes its place, and whoever reaps its lease queues its trial again.

    Raises:
        ValueError: a worker gave up, or workers die although no trial ends.
    """
    crew: list[tuple[SpawnProcess, Connection]] = []
    deaths, n_ended = 0, 0
    with _share(workers):  # around the loop as well, for the workers that replace others
        try:
            crew += [_start(post) for _ in range(workers)]
            while crew:
                time.sleep(REDRAW_S)
                table.refresh()
                for process, ear in list(crew):
                    if process.is_alive():
                        continue
                    crew.remove((process, ear))
                    # The process has ended, so all that it sent is in the pipe: nothing has to be waited for.
                    if ear.poll() and (message := _heard(ear)):
                        raise ValueError(message)
                    if process.exitcode != 0:
                        # Count afresh when a trial has ended since the last death: the study makes progress, and a
                        # trial that kills its workers fails by itself after some attempts. Without an end, workers
                        # die of something else, such as a library that does not load, and would do so for ever.
                        n_before, n_ended = n_ended, _n_ended(study)
                        deaths = deaths + 1 if n_ended == n_before else 1
                        if deaths > DEATHS * workers:
                            raise ValueError(
                                f"workers: {deaths} died with exit code {process.exitcode}, and no trial ended"
                            )
                        crew.append(_start(post))
        finally:
            # Empty unless this process was interrupted or raises. SIGTERM goes to all before any is waited for, so that
            # they give their trials back at the same time.
            for process, _ in crew:
                process.terminate()
            for process, _ in crew:
                process.join(GRACE_S)
                process.kill()  # does nothing to a process that has ended
                process.join()
            table.refresh()


def _n_ended(study: optuna.Study) -> int:
    """Trials that have ended in any way."""
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


def _heard(ear: Connection) -> str:
    """The message of a worker that has ended; empty where it sent none."""
    try:
        return str(ear.recv())
    except EOFError:  # the end of the pipe also counts as something to read
        return ""


def _start(post: _Post) -> tuple[SpawnProcess, Connection]:
    """Starts a worker that ignores Ctrl-C. A terminal sends that to all of them; the parent then ends its workers."""
    # A new interpreter, not a fork: torch's threads and an open storage do not survive a fork.
    context = multiprocessing.get_context("spawn")
    ear, mouth = context.Pipe(duplex=False)
    process = context.Process(target=work_at, args=(post, mouth))
    with _without_interrupts():  # what is ignored stays ignored in the new process, from its first moment
        process.start()
    mouth.close()  # the worker has its own copy; only with this one closed does the pipe end when the worker does
    return process, ear


def work_at(post: _Post, mouth: Connection | None = None) -> None:
    """Runs the worker's loop in a process of its own, and sends one line to the parent if it must give up.

    Args:
        mouth: where the line goes. A job of a cluster has none and raises; submitit keeps the error.
    """
    if post.parent is not None:
        # SIGTERM becomes SystemExit, so that the loop gives its trial back on the way out. A job of a cluster leaves
        # its signals to submitit.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        threading.Thread(target=_die_with, args=(post.parent,), daemon=True).start()
    try:
        sweep = load_sweep(post.file)
        study = open_study(sweep, open_storage(post.runs, post.storage, patience_s=PATIENCE_S), name=post.study)
        Worker(sweep, study, post.runs, post.options, Console(quiet=True)).work(post.n_trials)
    except Exception as error:
        if mouth is None:
            raise
        # These two are written for people; of any other the type says more than the text.
        mouth.send(str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}")


def _die_with(parent: int) -> None:
    """Ends this process when its parent is gone, so that the workers of a sweep that was killed do not go on unseen.

    A parent that is killed sends nothing. It is polled for: an orphan gets another parent.
    """
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)  # sys.exit in this thread would end the thread alone; the trial is reaped by its lease


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Makes processes that are started in the block ignore Ctrl-C.

    Python lets only the main thread set signal handlers; in any other the block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _share(workers: int) -> Iterator[None]:
    """Divides the cores among the processes started in the block, by an environment variable that they inherit."""
    before = os.environ.get(SHARE)
    os.environ[SHARE] = str(max(1, n_cores() // workers))
    try:
        yield
    finally:
        if before is None:
            del os.environ[SHARE]
        else:
            os.environ[SHARE] = before


def _work_on_cluster(
    post: _Post, study: optuna.Study, workers: int, cluster: Cluster, options: Mapping[str, Any], table: SweepTable
) -> None:
    """Submits the workers as jobs, and waits for all of them; an interruption cancels them.

    Raises:
        ValueError: submitit is missing or refuses the jobs, or a job failed and the study lacks trials.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise ValueError("--cluster: the package submitit is missing: pip install 'hybrid-frontier[cluster]'") from None
    executor = submitit.AutoExecutor(folder=post.runs / "cluster", cluster=cluster)
    try:
        executor.update_parameters(name=post.study, **options)
        # Jobs of SLURM have cores of their own. A batch is one array of jobs, submitted when its block ends.
        with _share(workers) if cluster == "local" else contextlib.nullcontext(), executor.batch():
            jobs = [executor.submit(work_at, post) for _ in range(workers)]
    except (NameError, TypeError, ValueError, RuntimeError, submitit.core.utils.FailedSubmissionError) as error:
        raise ValueError(f"--cluster: {cluster}: {' '.join(str(error).split())}") from None
    # No job is replaced here. The others take up its trial, and the same call submits new jobs.
    try:
        while not all(job.done() for job in jobs):
            time.sleep(REDRAW_S)
            table.refresh()
    finally:
        for job in jobs:
            if not job.done():
                job.cancel()
    # A job that failed matters only if the others did not make up for it.
    for job in jobs:
        if (failure := job.exception()) is not None and n_counted(study) < post.n_trials:
            last = str(failure).strip().splitlines()[-1]
            raise ValueError(f"--cluster: job {job.job_id} ended: {last}; its log is in {post.runs / 'cluster'}")
