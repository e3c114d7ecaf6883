"""The processes that work on a sweep: several on this machine, or jobs of a cluster.

A process that is lost is replaced here, and in a cluster by starting the sweep again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal

import optuna

from explore.study.identity import open_study
from explore.study.needs import check_needs
from explore.study.progress import n_counted
from explore.study.storage import PATIENCE_S, open_storage
from explore.study.sweep_file import load_sweep
from explore.study.worker import TrialOptions, Worker
from explore.terminal import plain_console
from explore.termination import termination_handled
from explore.threads import SHARE, n_cores

Cluster = Literal["slurm", "local"]
REDRAW_S = 1.0
DEATHS = 5
"""Deaths for each worker, without a trial that ends in between, after which the sweep ends with an error."""
GRACE_S = 20.0
"""Seconds that a worker has to give its trial back after SIGTERM, before it is killed."""


@dataclass(frozen=True)
class Post:
    """What a worker in another process needs to know; it can be pickled.

    Attributes:
        file: the sweep file. The worker loads it again, because the functions in it cannot be pickled.
        parent: process that the worker must not outlive; none for jobs of a cluster, which run on other hosts.
        parameters: values of parameters of the sweep file, where they are not its own.
    """

    file: Path
    study: str
    storage: str | None
    runs: Path
    n_trials: int
    options: TrialOptions
    parent: int | None
    parameters: Mapping[str, Any] = field(default_factory=dict)


def work_here(post: Post, study: optuna.Study, workers: int, refresh: Callable[[], None]) -> None:
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
            while len(crew) < workers:  # one by one: if one does not start, those before it are ended
                crew.append(start_worker(post))
            while crew:
                time.sleep(REDRAW_S)
                refresh()
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
                        crew.append(start_worker(post))
        finally:
            # Empty unless this process was interrupted or raises. SIGTERM goes to all before any is waited for, so that
            # they give their trials back at the same time.
            for process, _ in crew:
                process.terminate()
            for process, _ in crew:
                process.join(GRACE_S)
                process.kill()  # does nothing to a process that has ended
                process.join()
            refresh()


def _n_ended(study: optuna.Study) -> int:
    """Trials that have ended in any way."""
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


def _heard(ear: Connection) -> str:
    """The message of a worker that has ended; empty where it sent none."""
    try:
        return str(ear.recv())
    except EOFError:  # the end of the pipe also counts as something to read
        return ""


def start_worker(post: Post) -> tuple[SpawnProcess, Connection]:
    """Starts a worker that ignores Ctrl-C. A terminal sends that to all of them; the parent then ends its workers."""
    # A new interpreter, not a fork: torch's threads and an open storage do not survive a fork.
    context = multiprocessing.get_context("spawn")
    ear, mouth = context.Pipe(duplex=False)
    process = context.Process(target=work_at, args=(post, mouth))
    try:
        with _without_interrupts():  # what is ignored stays ignored in the new process, from its first moment
            process.start()
    except BaseException:
        ear.close()
        raise
    finally:
        mouth.close()  # the worker has its own copy; only with this one closed does the pipe end when the worker does
    return process, ear


def work_at(post: Post, mouth: Connection | None = None) -> None:
    """Runs the worker's loop in a process of its own, and sends one line to the parent if it must give up.

    Args:
        mouth: where the line goes. A job of a cluster has none and raises; submitit keeps the error.
    """
    if post.parent is not None:
        threading.Thread(target=_die_with, args=(post.parent,), daemon=True).start()
    # A job of a cluster has its signals handled by submitit.
    with termination_handled() if post.parent is not None else contextlib.nullcontext():
        try:
            sweep = load_sweep(post.file, post.parameters)
            check_needs(sweep.examples, post.runs)
            study = open_study(sweep, open_storage(post.runs, post.storage, patience_s=PATIENCE_S), name=post.study)
            Worker(sweep, study, post.runs, post.options, plain_console(quiet=True)).work(post.n_trials)
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


def work_on_cluster(
    post: Post,
    study: optuna.Study,
    workers: int,
    cluster: Cluster,
    options: Mapping[str, Any],
    refresh: Callable[[], None],
) -> None:
    """Submits the workers as jobs, and waits for all of them; an interruption cancels them.

    Raises:
        ValueError: submitit is missing or refuses the jobs, or a job failed and the study lacks trials.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise ValueError("--cluster: the package submitit is missing: pip install 'hybrid-frontier[cluster]'") from None
    folder = post.runs / "cluster"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)  # what is pickled there holds the URL of the storage, perhaps with a password
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
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
            refresh()
    finally:
        for job in jobs:
            if not job.done():
                job.cancel()
    # A job that failed matters only if the others did not make up for it.
    for job in jobs:
        if (failure := job.exception()) is not None and n_counted(study) < post.n_trials:
            last = str(failure).strip().splitlines()[-1]
            raise ValueError(f"--cluster: job {job.job_id} ended: {last}; its log is in {post.runs / 'cluster'}")
