"""The worker processes of a sweep: several on this machine, or cluster jobs.

A lost local process is replaced; lost cluster jobs are replaced by starting the sweep again.
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
"""Deaths per worker, without any trial ending in between, after which the sweep stops with an error."""
GRACE_S = 20.0
"""Seconds that a worker has after SIGTERM to give its trial back before it is killed."""


@dataclass(frozen=True)
class Post:
    """The arguments of a worker in another process; picklable.

    Attributes:
        file: the sweep file. The worker loads it again, because its functions cannot be pickled.
        parent: PID of the process that the worker must not outlive; None for cluster jobs, which run on other hosts.
        parameters: values set with `--set` that replace those in the sweep file.
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

    A worker ends in one of three ways. Exit code 0 without a message: the study has its trials. A message: it gave up
    for a reason that affects all workers, such as a full disk, so the sweep stops. Otherwise it was killed, for example
    by the out-of-memory killer: a new worker replaces it, and whoever reaps its lease queues its trial again.

    Raises:
        ValueError: a worker gave up, or workers keep dying while no trial ends.
    """
    crew: list[tuple[SpawnProcess, Connection]] = []
    deaths, n_ended = 0, 0
    with _share(workers):  # also covers workers that replace others
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
                    # The process has ended, so everything it sent is already in the pipe.
                    if ear.poll() and (message := _heard(ear)):
                        raise ValueError(message)
                    if process.exitcode != 0:
                        # Reset the count if a trial has ended since the last death: the study makes progress, and a
                        # trial that kills its workers fails after some attempts. If no trial ends, workers die for
                        # another reason, such as a library that does not load, and would die for ever.
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
    """Number of trials that have ended in any way."""
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


def _heard(ear: Connection) -> str:
    """The message of an ended worker; empty if it sent none."""
    try:
        return str(ear.recv())
    except EOFError:  # the end of the pipe also counts as something to read
        return ""


def start_worker(post: Post) -> tuple[SpawnProcess, Connection]:
    """Starts a worker that ignores Ctrl-C. A terminal sends it to every process; the parent then stops its workers."""
    # A new interpreter, not a fork: torch's threads and an open storage do not survive a fork.
    context = multiprocessing.get_context("spawn")
    ear, mouth = context.Pipe(duplex=False)
    process = context.Process(target=work_at, args=(post, mouth))
    try:
        with _without_interrupts():  # the new process inherits ignored signals, from its first moment
            process.start()
    except BaseException:
        ear.close()
        raise
    finally:
        mouth.close()  # the worker has its own copy; with this one closed, the pipe ends when the worker does
    return process, ear


def work_at(post: Post, mouth: Connection | None = None) -> None:
    """Runs the worker's loop in this process, and sends one line to the parent if it must give up.

    Args:
        mouth: connection for that line. Without one (a cluster job) the error is raised, and submitit keeps it.
    """
    if post.parent is not None:
        threading.Thread(target=_die_with, args=(post.parent,), daemon=True).start()
    # submitit handles the signals of a cluster job.
    with termination_handled() if post.parent is not None else contextlib.nullcontext():
        try:
            sweep = load_sweep(post.file, post.parameters)
            check_needs(sweep.examples, post.runs)
            study = open_study(sweep, open_storage(post.runs, post.storage, patience_s=PATIENCE_S), name=post.study)
            Worker(sweep, study, post.runs, post.options, plain_console(quiet=True)).work(post.n_trials)
        except Exception as error:
            if mouth is None:
                raise
            # Messages of these two are written for users; for other errors the type says more than the text.
            mouth.send(str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}")


def _die_with(parent: int) -> None:
    """Ends this process when its parent is gone, so that workers of a killed sweep do not keep running unnoticed.

    A killed parent sends no message, so this polls: an orphan gets another parent.
    """
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)  # sys.exit would end only this thread; the trial is reaped by its lease


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Makes processes started in the block ignore Ctrl-C.

    Only Python's main thread may set signal handlers; in other threads the block changes nothing.
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
    """Divides the cores among processes started in the block, through an environment variable that they inherit."""
    before = os.environ.get(SHARE)
    os.environ[SHARE] = str(max(1, n_cores() // workers))
    try:
        yield
    finally:
        if before is None:
            del os.environ[SHARE]
        else:
            os.environ[SHARE] = before


def cluster_executor(folder: Path, cluster: Cluster, options: Mapping[str, Any]) -> Any:
    """Returns submitit's executor with these parameters; submits nothing.

    Raises:
        ValueError: submitit is missing, there is no such cluster here, or a parameter is unknown.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise ValueError("--cluster: the package submitit is missing: pip install 'hybrid-frontier[cluster]'") from None
    with _rejections(cluster):
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**options)
    return executor


@contextlib.contextmanager
def _rejections(cluster: Cluster) -> Iterator[None]:
    """Turns the errors of submitit into errors of one line."""
    from submitit.core.utils import FailedSubmissionError

    try:
        yield
    except (NameError, TypeError, ValueError, RuntimeError, FailedSubmissionError) as error:
        raise ValueError(f"--cluster: {cluster}: {' '.join(str(error).split())}") from None


def work_on_cluster(
    post: Post,
    study: optuna.Study,
    workers: int,
    cluster: Cluster,
    options: Mapping[str, Any],
    refresh: Callable[[], None],
) -> None:
    """Submits the workers as cluster jobs and waits for all of them; an interruption cancels them.

    Raises:
        ValueError: submitit is missing or rejects the jobs, or a job failed and the study lacks trials.
    """
    folder = post.runs / "cluster"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)  # the pickled arguments include the storage URL, perhaps with a password
    with _rejections(cluster):
        executor = cluster_executor(folder, cluster, options)
        executor.update_parameters(name=post.study)
        # SLURM gives each job its own cores. A batch is one job array, submitted when its block ends.
        with _share(workers) if cluster == "local" else contextlib.nullcontext(), executor.batch():
            jobs = [executor.submit(work_at, post) for _ in range(workers)]
    # Lost jobs are not replaced here: other jobs take over their trials, and the same call submits new jobs.
    try:
        while not all(job.done() for job in jobs):
            time.sleep(REDRAW_S)
            refresh()
    finally:
        for job in jobs:
            if not job.done():
                job.cancel()
    # A failed job matters only if the study still lacks trials.
    for job in jobs:
        if (failure := job.exception()) is not None and n_counted(study) < post.n_trials:
            last = str(failure).strip().splitlines()[-1]
            raise ValueError(f"--cluster: job {job.job_id} ended: {last}; its log is in {post.runs / 'cluster'}")
